#!/usr/bin/env bash
# Two steps of a tiny model on the CPU, with the `megavlm` and `python` of the PATH: a check of an environment.
set -euo pipefail
export MEGAVLM_PLATFORM=cpu OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python -c "from pathlib import Path; from megavlm.demo.model_folder import make_model_folder as make; make(Path('tiny'))"
cat >train.jsonl <<'END'
{"messages": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]}
{"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]}
END
cat >settings.yaml <<'END'
model: {hf: tiny, load: tiny}
data: {train: train.jsonl, seq_length: 64, workers: 1}
train: {steps: 2, global_batch_size: 1, lr: 1e-3, precision: fp32}
output: run
END
megavlm sft settings.yaml
echo "trained for $(wc -l <run/metrics.jsonl) steps"
