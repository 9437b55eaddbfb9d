# shellcheck shell=bash
# Sourced by the job scripts of this folder; `launch VERB CONFIG [section.key=value …]` starts one process per GPU.
#
#   sbatch launch/stage1.sh                                       train the model 8b on the default number of nodes
#   MEGAVLM_MODEL=32b sbatch --nodes=8 launch/stage1.sh           train another model on more nodes
#   sbatch launch/stage1.sh train.lr=1e-5                         change a setting
#   MEGAVLM_TUNER=lora sbatch launch/sft.sh                       train an adapter, with sft-lora.yaml
#   DRY_RUN=1 MEGAVLM_MODEL=32b NODES=8 launch/stage1.sh          print the command of each rank; needs no SLURM
#
# Submit from the top of the checkout (or set MEGAVLM_HOME to it). The checkout and the folders below must be on a file
# system that all nodes share. SLURM reads account and partition from SBATCH_ACCOUNT and SBATCH_PARTITION.
#
#   MEGAVLM_MODEL    the file of configs/models/*.yaml to use             (default: 8b)
#   MEGAVLM_TUNER    full, or lora for adapters in sft, rm, dpo, kto, grpo, ppo (default: full)
#   MEGAVLM_MODELS   folder of the Hugging Face folders 2b, 8b, …         (default: configs/models, without weights)
#   MEGAVLM_DATA     folder of the training files                         (default: data)
#   MEGAVLM_RUNS     folder for the runs: RUNS/MODEL/stage1/…             (default: runs)
#   MEGAVLM_IMAGE    container image for pyxis/enroot, see docker/Dockerfile (default: none; MEGAVLM_VENV is used)
#   MEGAVLM_MOUNTS   further pyxis mounts, separated by commas            (default: none; the checkout is mounted)
#   MEGAVLM_VENV     environment in which megavlm is installed            (default: .venv of the checkout)
#   MEGAVLM_GPU      a GPU, such as h100: a dry run says whether the layout fits it (see `megavlm plan`); a job, if it does not
#   MEGAVLM_RETRIES  how often in a row a job that failed is requeued     (default: 3; 0: never)
#   MEGAVLM_SERVER_NODES     how many nodes of the job, its last ones, sample with vLLM (grpo, ppo; default: 0)
#   MEGAVLM_SERVERS_PER_NODE how many servers share the GPUs of such a node              (default: 1)
set -euo pipefail
# shellcheck source=launch/servers.sh
source "$MEGAVLM_HOME/launch/servers.sh"

# The environment of each rank. Variables that are set when the job is submitted take precedence. Sites can add their
# own NCCL_SOCKET_IFNAME, NCCL_IB_HCA, … in the same way, because SLURM passes on the environment of the submitting
# shell.
rank_environment() {
  : "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"                # one queue: Megatron's overlap relies on the order of launches
  : "${PYTORCH_ALLOC_CONF:=expandable_segments:True}"  # numbers of patches differ between rows; avoids fragmentation
  : "${NCCL_DEBUG:=WARN}"                              # reports only problems, such as a network that is not found
  : "${OMP_NUM_THREADS:=1}"                            # eight ranks and their data workers share the cores of a node
  : "${HF_HUB_OFFLINE:=1}"                             # models are local folders, so ranks need not contact the hub
  : "${TOKENIZERS_PARALLELISM:=false}"                 # data workers already run in parallel
  : "${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:=0}"           # NVIDIA's image sets 1: fp32 products with 10 bits of mantissa
  environment=(CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_ALLOC_CONF NCCL_DEBUG OMP_NUM_THREADS HF_HUB_OFFLINE
    TOKENIZERS_PARALLELISM TORCH_ALLOW_TF32_CUBLAS_OVERRIDE MASTER_ADDR MASTER_PORT)
  # gloo would take the interface to which the name of the host belongs, which may reach no other node. NCCL's variable
  # is used for gloo too if it names one interface; a list of prefixes or of exceptions means nothing to gloo.
  if [[ ${NCCL_SOCKET_IFNAME:-} =~ ^=?([[:alnum:]._-]+)$ && -e /sys/class/net/${BASH_REMATCH[1]} ]]; then
    : "${GLOO_SOCKET_IFNAME:=${BASH_REMATCH[1]}}"
  fi
  if [[ -n ${GLOO_SOCKET_IFNAME:-} ]]; then
    environment+=(GLOO_SOCKET_IFNAME)
  fi
  export MASTER_ADDR=$address
  export MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000)) # below the ephemeral ports; jobs on shared nodes differ
  export "${environment[@]}"
}

# The value of an `#SBATCH --NAME=VALUE` line of the job script, so that a dry run uses the same values as sbatch.
sbatch_header() {
  sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$0"
}

# configs/tune/sft.yaml, or configs/tune/sft-lora.yaml with MEGAVLM_TUNER=lora.
config_of_tuner() {
  local config=$1
  if [[ ${MEGAVLM_TUNER:-full} != full ]]; then
    config=${1%.yaml}-$MEGAVLM_TUNER.yaml
    if [[ ! -f $config ]]; then
      echo "MEGAVLM_TUNER is $MEGAVLM_TUNER, but $config does not exist; lora is available for sft, rm, dpo, kto, grpo and ppo" >&2
      return 2
    fi
  fi
  echo "$config"
}

# The address by which SLURM itself reaches a node; the same as its name, unless a site says otherwise.
address_of() {
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
  else
    echo "$1"
  fi
}

launch() {
  local nodes gpus cpus config address servers server_step python=python name=${SLURM_JOB_NAME:-$(sbatch_header job-name)}
  local -a hosts environment container=() first=() server_srun trainer_words server_words
  nodes=${SLURM_JOB_NUM_NODES:-${NODES:-$(sbatch_header nodes)}}
  gpus=${SLURM_NTASKS_PER_NODE:-$(sbatch_header ntasks-per-node)}
  cpus=${SLURM_CPUS_PER_TASK:-$(sbatch_header cpus-per-task)}
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  else
    mapfile -t hosts < <(seq --format=node%.0f 0 $((nodes - 1)))
  fi
  address=$(address_of "${hosts[0]}")
  rank_environment
  cd "$MEGAVLM_HOME"
  config=$(config_of_tuner "$2")

  # `python -m` imports the package from the current folder, so a container runs the checkout that was submitted.
  local logs=${MEGAVLM_RUNS:-runs}/logs/$name-${SLURM_JOB_ID:-0}
  if [[ -n ${MEGAVLM_IMAGE:-} ]]; then
    # Without --container-env, a variable that the image sets hides the one of the job.
    container=(--container-image="$MEGAVLM_IMAGE" --container-workdir="$PWD"
      --container-env="$(IFS=, && echo "${environment[*]}")"
      --container-mounts="$PWD:$PWD${MEGAVLM_MOUNTS:+,$MEGAVLM_MOUNTS}")
  else
    python=${MEGAVLM_VENV:-$PWD/.venv}/bin/python
  fi
  plan_servers "$@"
  # Each task sees all GPUs of its node and uses the one of its local rank: --gpus-per-task would hide the others, and
  # NVLink with them. If a rank fails, the job ends, so that the other ranks do not wait for it. --ntasks: the job's
  # variable would count the nodes of servers, too.
  local -a srun=(srun --nodes="$nodes" "${first[@]}" --ntasks="$((nodes * gpus))" --ntasks-per-node="$gpus" --cpus-per-task="$cpus"
    --kill-on-bad-exit=1 --open-mode=append --output="$logs/rank-%t.log" "${container[@]}")
  local -a command=("$python" -m megavlm "$1" "$config" "${@:3}" "${trainer_words[@]}")

  local with=""
  if ((servers)); then
    with=" and $servers with vLLM"
  fi
  echo "$name: MEGAVLM_MODEL=${MEGAVLM_MODEL:-8b}, $nodes nodes × $gpus GPUs$with, logs in $logs"
  if [[ ${DRY_RUN:-0} != 0 ]]; then
    if [[ -n ${MEGAVLM_GPU:-} ]]; then
      say_whether_it_fits "$1" "${@:3}" "${trainer_words[@]}" >&2
    fi
    print_ranks
    if ((servers)); then
      print_words "${server_srun[@]}" "${@:3}" "${server_words[@]}"
    fi
  else
    mkdir -p "$logs"
    if [[ -n ${MEGAVLM_GPU:-} ]]; then # meanwhile, the ranks start
      say_whether_it_fits "$1" "${@:3}" "${trainer_words[@]}" | grep -E 'does not fit|found out' >&2 &
    fi
    start_servers "${@:3}"
    run_and_requeue
  fi
}

# Says in a line whether the layout fits MEGAVLM_GPU. It refuses nothing, and takes the time of a plan.
say_whether_it_fits() {
  local word
  local -a settings=()
  for word in "${@:2}"; do
    if [[ $word != -* && $word == *=* ]]; then
      settings+=("$word")
    fi
  done
  "$python" -m megavlm validate "$config" "${settings[@]}" --world-size "$((nodes * gpus))" --no-files --for "$1" \
    --gpu "$MEGAVLM_GPU" | grep '^by the plan' || echo "whether the layout fits $MEGAVLM_GPU could not be found out"
}

# Prints words in shell syntax, on a line.
print_words() {
  printf '%q ' "$@"
  echo
}

# Prints the srun command, then one line per rank: its node and local rank, followed by its environment and command in
# shell syntax.
print_ranks() {
  local node local_rank rank name
  print_words "${srun[@]}" "${command[@]}"
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

# Starts the ranks and waits for them. With `#SBATCH --signal=B:USR1@900`, SLURM sends USR1 to this script 900 s before
# the time limit: time for the rest of a step and for a checkpoint. The ranks then end with status 0, and the job is
# requeued to continue. It is requeued, too, if they have not ended a minute before the limit, or if a rank failed.
# Wrong settings or data (status 2) would be wrong again. SLURM itself requeues a job whose node it has found dead
# (--requeue).
run_and_requeue() {
  local status=0 warned=0 overran=0 ranks
  "${srun[@]}" "${command[@]}" &
  ranks=$!
  trap 'warned=1; trap "" USR1; kill -USR1 "$ranks" || true' USR1 # srun forwards it to the ranks; one signal is enough
  trap 'overran=1' USR2
  wait "$ranks" || status=$?
  if ((warned)); then # the trap ended the wait above, but srun is still running
    watch_the_time &
    status=0
    wait "$ranks" || status=$?
    kill $! 2>/dev/null || true
  fi
  stop_servers
  if ((overran)); then
    requeue_after_failure "step and checkpoint took longer than the warning before the time limit"
  elif ((warned && status == 0)); then
    rm -f "$logs/failures"
    requeue "stopped before the time limit"
  elif ((status == 2)); then
    echo "not requeued: settings or data are wrong (status 2); see $logs"
  elif ((status != 0)); then
    requeue_after_failure "a rank failed (status $status); see $logs"
  fi
  return "$status"
}

# Sends USR2 to this script one minute before the time limit of the job, if it has a limit.
watch_the_time() {
  local end
  end=$(date --date="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s) || return 0
  sleep "$((end > $(date +%s) + 60 ? end - $(date +%s) - 60 : 0))"
  kill -USR2 $$
}

# Requeues the job unless it has failed too often since it last stopped at a time limit: `failures` has a line for each.
requeue_after_failure() {
  local count
  echo "$(date +%FT%T) $1" >>"$logs/failures"
  count=$(wc -l <"$logs/failures")
  if ((count > ${MEGAVLM_RETRIES:-3})); then
    echo "not requeued: $1; failure $count in a row, and MEGAVLM_RETRIES is ${MEGAVLM_RETRIES:-3}"
  else
    requeue "$1; failure $count in a row, of at most ${MEGAVLM_RETRIES:-3}"
  fi
}

# Requeues the job. scancel ends this script together with the ranks, so a cancelled job does not come here.
requeue() {
  echo "requeued: $1"
  scontrol requeue "$SLURM_JOB_ID"
}
