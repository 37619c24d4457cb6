#!/usr/bin/env bash
# Embed what is new in a corpus: for cron, every night.
#
#   0 2 * * *  jobs/nightly.sh 's3://bucket/corpus' /data/embeddings ViT-L-14 datacomp_xl_s13b_b90k
#
# Safe to start while last night's run still works: the second one says so and ends. Whatever stopped a run before, this one
# goes on from there. Where an image crashes its decoder, and with it the run, another run rejects that image and goes on.
# A line a run is added to EMBEDDINGS/nightly.jsonl. Exit status as of `clipindex embed`.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: $0 SHARDS EMBEDDINGS MODEL [PRETRAINED]" >&2
  exit 2
fi
shards=$1 embeddings=$2 model=$3 pretrained=${4:-}

mkdir -p "$embeddings"
exec 9> "$embeddings/.nightly.lock" # the kernel frees it when this process ends, however it ends
if ! flock --nonblock 9; then
  echo "another nightly run is at work on $embeddings" >&2
  exit 0
fi

for _ in {1..20}; do
  status=0
  summary=$(clipindex embed "$shards" --out "$embeddings" --model "$model" ${pretrained:+--pretrained "$pretrained"} --json) ||
    status=$?
  case $status in
  132 | 134 | 135 | 136 | 137 | 139) echo "the run was killed (status $status): running again, its images one by one" >&2 ;;
  *) break ;;
  esac
done
if [ -n "$summary" ]; then
  printf '%s\n' "$summary" | tr -d '\n' | sed "s/^{/{\"finished\": \"$(date -u +%FT%TZ)\",/; s/\$/\n/" >> "$embeddings/nightly.jsonl"
fi
exit "$status"
