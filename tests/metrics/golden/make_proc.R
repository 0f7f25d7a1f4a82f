# Writes proc.json, what the R package pROC says of AUCs, their variance and paired tests:
#     Rscript make_proc.R > proc.json
# It needs R and pROC (Debian: r-cran-proc).
suppressMessages(library(pROC))

number <- function(x) ifelse(is.na(x), "null", sprintf("%.17g", as.numeric(x)))
array <- function(x) paste0("[", paste(number(x), collapse = ", "), "]")
field <- function(name, value) sprintf("\"%s\": %s", name, value)
object <- function(...) paste0("{", paste(c(...), collapse = ",\n    "), "}")

case <- function(name, labels, first, second) {
  one <- roc(labels, first, levels = c(0, 1), direction = "<", quiet = TRUE)
  other <- roc(labels, second, levels = c(0, 1), direction = "<", quiet = TRUE)
  test <- roc.test(one, other, method = "delong", paired = TRUE)
  object(
    field("name", sprintf("\"%s\"", name)),
    field("labels", array(labels)),
    field("first", array(first)),
    field("second", array(second)),
    field("auc", array(c(auc(one), auc(other)))),
    field("variance", array(c(var(one, method = "delong"), var(other, method = "delong")))),
    field("covariance", number(cov(one, other, method = "delong"))),
    field("low_auc_high", array(ci.auc(one, method = "delong", conf.level = 0.95))),
    field("z", number(test$statistic)),
    field("p", number(test$p.value))
  )
}

drawn <- function(name, positives, negatives, effect, digits) {
  labels <- rep(c(1, 0), c(positives, negatives))
  shared <- rnorm(length(labels)) + effect * labels
  first <- round(shared + rnorm(length(labels)), digits)
  case(name, labels, first, round(shared + rnorm(length(labels)), digits))
}

set.seed(1)
cases <- c(
  drawn("30 of 100, no ties", 30, 70, 1, 8),
  drawn("30 of 100, many ties", 30, 70, 1, 0),
  drawn("5 of 200", 5, 195, 1.5, 3),
  drawn("300 of 400", 300, 100, 0.5, 2)
)
versions <- sprintf("\"%s, pROC %s\"", R.version.string, packageVersion("pROC"))
cat(sprintf("{%s,\n  \"cases\": [\n  %s]}\n", field("made_by", versions), paste(cases, collapse = ",\n  ")))
