# Writes base.json, what R itself says of logistic regressions on log odds and of McNemar's test:
#     Rscript make_base.R > base.json

number <- function(x) paste0("[", paste(sprintf("%.17g", as.numeric(x)), collapse = ", "), "]")
field <- function(name, value) sprintf("\"%s\": %s", name, value)
object <- function(...) paste0("{", paste(c(...), collapse = ",\n    "), "}")
list_of <- function(...) paste0("[\n  ", paste(c(...), collapse = ",\n  "), "]")

recalibrated <- function(n, slope, intercept) {
  odds <- round(2 * rnorm(n), 3)
  labels <- as.numeric(runif(n) < plogis(slope * odds + intercept))
  fitted <- glm(labels ~ odds, family = binomial, control = list(epsilon = 1e-14, maxit = 100))
  object(field("log_odds", number(odds)), field("labels", number(labels)),
         field("intercept_slope", number(coef(fitted))))
}

# a: both right, b: only the first, c: only the second, d: both wrong.
mcnemar <- function(a, b, c, d) {
  table <- matrix(c(a, c, b, d), 2)
  object(field("table", number(c(a, b, c, d))),
         field("chi_square", number(mcnemar.test(table, correct = FALSE)$statistic)),
         field("p_chi_square", number(mcnemar.test(table, correct = FALSE)$p.value)),
         field("p_exact", number(binom.test(b, b + c, 0.5)$p.value)),
         field("half_of_found", number(dbinom(b, b + c, 0.5))))
}

set.seed(2)
cat("{", field("made_by", sprintf("\"%s\"", R.version.string)), ",\n",
    field("recalibration", list_of(recalibrated(60, 1, 0), recalibrated(200, 0.5, -1),
                                   recalibrated(100, -0.7, 0.3))), ",\n",
    field("mcnemar", list_of(mcnemar(40, 12, 5, 3), mcnemar(100, 3, 9, 20), mcnemar(5, 1, 0, 2),
                             mcnemar(30, 8, 8, 4), mcnemar(10, 0, 6, 10))), "}\n", sep = "")
