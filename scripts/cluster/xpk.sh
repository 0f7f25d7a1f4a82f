#!/usr/bin/env bash
# On a TPU slice of a cluster that `xpk cluster create` has made: bash xpk.sh embed|finetune
# Every host runs the same command; xpk's JobSet starts all again when one is lost or its machine
# failed (exit code 1), and the run resumes.
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${ZONE:?its zone}" "${PROJECT:?}" "${BUCKET:?}"
: "${IMAGE:?built with DEVICE=tpu, see README.md}"

case "${1:-}" in
  embed)
    command="medsiglip-jax embed --distributed --model gs://$BUCKET/medsiglip-448 \
      --dtype bfloat16 --stored float16 --output gs://$BUCKET/embeddings \
      'gs://$BUCKET/shards/*.tar' || [ \$? -eq 3 ]"
    ;;
  finetune)
    command="medsiglip-jax finetune --distributed --config tpu_slice \
      --workdir gs://$BUCKET/run --config.init=gs://$BUCKET/medsiglip-448 \
      --config.data.path=gs://$BUCKET/train.parquet"
    ;;
  *)
    echo "usage: bash xpk.sh embed|finetune" >&2
    exit 2
    ;;
esac

xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --workload="medsiglip-$1" --tpu-type=v5litepod-16 --num-slices=1 --spot --max-restarts=20 \
  --restart-on-exit-codes=1 --docker-image="$IMAGE" --command="$command"
