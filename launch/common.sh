# shellcheck shell=bash
# Sourced by the job scripts of this folder; `launch VERB CONFIG [section.key=value …]` starts one process per GPU.
#
#   sbatch launch/stage1.sh                                       the model 8b, on the nodes that the script asks for
#   MEGAVLM_MODEL=32b sbatch --nodes=8 launch/stage1.sh           another model, on the GPUs its configuration is for
#   sbatch launch/stage1.sh train.lr=1e-5                         a setting changed
#   MEGAVLM_TUNER=lora sbatch launch/sft.sh                       an adapter instead of the weights: sft-lora.yaml
#   DRY_RUN=1 MEGAVLM_MODEL=32b NODES=8 launch/stage1.sh          print what each rank would run; needs no SLURM
#
# Submit from the top of the checkout (or set MEGAVLM_HOME to it); it and the folders below lie on a file system that
# all nodes see. Account and partition come from SLURM's own SBATCH_ACCOUNT and SBATCH_PARTITION.
#
#   MEGAVLM_MODEL    which configs/models/*.yaml               (8b)
#   MEGAVLM_TUNER    what learns in sft, rm, dpo and kto: full or lora, configs/tune/*-lora.yaml  (full)
#   MEGAVLM_MODELS   holds the Hugging Face folders 2b, 8b, …  (configs/models, which has shapes but no weights)
#   MEGAVLM_DATA     holds the training files                  (data)
#   MEGAVLM_RUNS     gets the runs: RUNS/MODEL/stage1/…        (runs)
#   MEGAVLM_IMAGE    container image for pyxis/enroot, see docker/Dockerfile; unset: MEGAVLM_VENV
#   MEGAVLM_MOUNTS   further pyxis mounts, comma-separated     (none; the checkout is always mounted)
#   MEGAVLM_VENV     environment with megavlm installed        (.venv of the checkout)
set -euo pipefail

# The environment of every rank. What the job was submitted with wins; sites add their own NCCL_SOCKET_IFNAME,
# NCCL_IB_HCA, … in the same way, since SLURM hands the submitting shell's environment on.
rank_environment() {
  : "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"                # one queue: Megatron's overlap relies on the order of launches
  : "${PYTORCH_ALLOC_CONF:=expandable_segments:True}"  # rows hold unlike numbers of patches: without it, fragments
  : "${NCCL_DEBUG:=WARN}"                              # a fabric that is not found is said, the rest is quiet
  : "${OMP_NUM_THREADS:=1}"                            # eight ranks and their data workers share a node's cores
  : "${HF_HUB_OFFLINE:=1}"                             # models are local folders: 1,000 ranks never ask the hub
  : "${TOKENIZERS_PARALLELISM:=false}"                 # the data workers are the parallelism
  environment=(CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_ALLOC_CONF NCCL_DEBUG OMP_NUM_THREADS HF_HUB_OFFLINE
    TOKENIZERS_PARALLELISM MASTER_ADDR MASTER_PORT)
  export MASTER_ADDR=${hosts[0]}
  export MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000)) # below the ephemeral ports; jobs on shared nodes differ
  export "${environment[@]}"
}

# The value of an `#SBATCH --NAME=VALUE` line of the job script, so that a dry run asks for what sbatch would.
sbatch_header() {
  sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$0"
}

# configs/tune/sft.yaml, or configs/tune/sft-lora.yaml with MEGAVLM_TUNER=lora.
config_of_tuner() {
  local config=$1
  if [[ ${MEGAVLM_TUNER:-full} != full ]]; then
    config=${1%.yaml}-$MEGAVLM_TUNER.yaml
    if [[ ! -f $config ]]; then
      echo "MEGAVLM_TUNER is $MEGAVLM_TUNER, but there is no $config; lora is for sft, rm, dpo and kto" >&2
      return 2
    fi
  fi
  echo "$config"
}

launch() {
  local nodes gpus cpus config name=${SLURM_JOB_NAME:-$(sbatch_header job-name)}
  local -a hosts environment
  nodes=${SLURM_JOB_NUM_NODES:-${NODES:-$(sbatch_header nodes)}}
  gpus=${SLURM_NTASKS_PER_NODE:-$(sbatch_header ntasks-per-node)}
  cpus=${SLURM_CPUS_PER_TASK:-$(sbatch_header cpus-per-task)}
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  else
    mapfile -t hosts < <(seq --format=node%.0f 0 $((nodes - 1)))
  fi
  rank_environment
  cd "$MEGAVLM_HOME"
  config=$(config_of_tuner "$2")

  # `python -m` takes the package from the current folder: a container runs the checkout that was submitted.
  local -a srun command=(python -m megavlm "$1" "$config" "${@:3}")
  local logs=${MEGAVLM_RUNS:-runs}/logs/$name-${SLURM_JOB_ID:-0}
  # Every task sees all GPUs of its node and takes the one of its local rank: --gpus-per-task would hide the others,
  # and with them NVLink. A rank that fails ends the job instead of leaving the rest to wait for it.
  srun=(srun --nodes="$nodes" --ntasks-per-node="$gpus" --cpus-per-task="$cpus"
    --kill-on-bad-exit=1 --open-mode=append --output="$logs/rank-%t.log")
  if [[ -n ${MEGAVLM_IMAGE:-} ]]; then
    srun+=(--container-image="$MEGAVLM_IMAGE" --container-workdir="$PWD"
      --container-mounts="$PWD:$PWD${MEGAVLM_MOUNTS:+,$MEGAVLM_MOUNTS}")
  else
    command[0]=${MEGAVLM_VENV:-$PWD/.venv}/bin/python
  fi

  echo "$name: MEGAVLM_MODEL=${MEGAVLM_MODEL:-8b}, $nodes nodes × $gpus GPUs, logs in $logs"
  if [[ ${DRY_RUN:-0} != 0 ]]; then
    print_ranks
  else
    mkdir -p "$logs"
    run_until_signal
  fi
}

# The srun command, then one line per rank: its node and local rank, and from the second word on a command with its
# environment that a shell understands.
print_ranks() {
  local node local_rank rank name
  printf '%q ' "${srun[@]}" "${command[@]}"
  echo
  for ((rank = 0; rank < nodes * gpus; rank++)); do
    node=$((rank / gpus)) local_rank=$((rank % gpus))
    printf '%s[%d] SLURM_STEP_ID=0 SLURM_PROCID=%d SLURM_LOCALID=%d SLURM_NTASKS=%d' \
      "${hosts[node]}" "$local_rank" "$rank" "$local_rank" $((nodes * gpus))
    for name in "${environment[@]}"; do
      printf ' %s=%q' "$name" "${!name}"
    done
    printf ' %q' "${command[@]}"
    echo
  done
}

# `#SBATCH --signal=B:USR1@300` tells this script 300 s before the time limit. The ranks then write a checkpoint and
# end with status 0, and the job goes back into the queue, to continue from it. Any other end is final; SLURM itself
# puts a job back whose node failed (--requeue).
run_until_signal() {
  local status=0 signalled=0
  trap 'signalled=1; trap "" USR1; kill -USR1 $!' USR1 # srun hands it to the ranks; once is enough
  "${srun[@]}" "${command[@]}" &
  wait $! || status=$?
  if ((signalled)); then # the trap ended that wait, not srun
    status=0
    wait $! || status=$?
    if ((status == 0)); then
      echo "stopped before the time limit; requeued"
      scontrol requeue "$SLURM_JOB_ID"
    fi
  fi
  return "$status"
}
