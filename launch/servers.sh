# shellcheck shell=bash disable=SC2034,SC2154  # variables of `launch` are read and set here
# Sourced by common.sh: servers of vLLM on the last MEGAVLM_SERVER_NODES nodes of a job, for methods that sample answers.

# Takes the nodes of the servers from those of the job, and sets the command of their step (`server_srun`), what is
# added to it after the settings of the job (`server_words`), and what is added to the trainer's (`first`,
# `trainer_words`). These and what it reads are variables of `launch`, which passes its arguments.
plan_servers() {
  local verb=$1 each=${MEGAVLM_SERVERS_PER_NODE:-1} node number host
  servers=${MEGAVLM_SERVER_NODES:-0}
  trainer_words=() server_words=()
  ((servers)) || return 0
  if [[ $verb != grpo && $verb != ppo ]]; then
    echo "MEGAVLM_SERVER_NODES is $servers, but $verb samples no answers; leave it unset" >&2
    return 2
  fi
  if ((servers >= nodes)); then
    echo "MEGAVLM_SERVER_NODES is $servers, but the job has $nodes nodes, and the trainer needs one; use --nodes" >&2
    return 2
  fi
  if ((each < 1 || gpus % each)); then
    echo "MEGAVLM_SERVERS_PER_NODE is $each, which does not divide the $gpus GPUs of a node" >&2
    return 2
  fi
  nodes=$((nodes - servers)) first=(--relative=0)
  local port=$((10000 + 10 * (${SLURM_JOB_ID:-0} % 900))) # below the ephemeral ports and MASTER_PORT
  local -a urls=()
  for ((node = 0; node < servers; node++)); do
    host=$(address_of "${hosts[nodes + node]}")
    for ((number = node * each; number < (node + 1) * each; number++)); do
      urls+=("http://$host:$((port + number))")
    done
  done
  trainer_words=(rollout.engine=vllm "rollout.vllm.url=[$(IFS=, && echo "${urls[*]}")]")
  server_words=(rollout.engine=vllm "rollout.vllm.tensor_parallel=$((gpus / each))")
  server_srun=(srun --nodes="$servers" --relative="$nodes" --ntasks="$((servers * each))" --ntasks-per-node="$each"
    --cpus-per-task="$((cpus * gpus / each))" --kill-on-bad-exit=0 --open-mode=append
    --output="$logs/server-%t.log" "${container[@]}" bash -c "$serve" serve "$port" "$((gpus / each))"
    "$python" -m megavlm.vllm.serve "$config")
}

# Each server has its port and its share of the node's GPUs, and none of the settings that are for training. One that
# dies starts again, and the trainer gives it the weights; wrong settings (status 2) would be wrong again.
# shellcheck disable=SC2016  # expanded on the node of the server
serve='port=$(($1 + SLURM_PROCID)) share=$2; shift 2
unset MASTER_ADDR MASTER_PORT CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_ALLOC_CONF OMP_NUM_THREADS
export CUDA_VISIBLE_DEVICES=$(seq -s, $((SLURM_LOCALID * share)) $((SLURM_LOCALID * share + share - 1)))
while :; do
  status=0; "$@" --port "$port" || status=$?
  ((status == 2)) && exit 2
  echo "the server has ended with status $status; it starts again"
  sleep 5
done'

# Starts the servers of the job, which end with it.
start_servers() {
  ((servers)) || return 0
  "${server_srun[@]}" "$@" "${server_words[@]}" &
  server_step=$!
}

# Ends the servers.
stop_servers() {
  ((servers)) || return 0
  kill "$server_step" 2>/dev/null || true
  wait "$server_step" || true
}
