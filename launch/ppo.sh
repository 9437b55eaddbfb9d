#!/usr/bin/env bash
# Reinforcement learning with a critic (PPO): two models learn.
# Nodes by model: 2b 1, 4b 1, 8b 2, 30b-a3b 4, 32b 8, 235b-a22b 32. Variables and examples: common.sh.
#SBATCH --job-name=megavlm-ppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# sbatch runs a copy of this file, so the checkout is found through the folder from which the job was submitted.
MEGAVLM_HOME=${MEGAVLM_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
# shellcheck source=launch/common.sh
source "$MEGAVLM_HOME/launch/common.sh"
launch ppo configs/align/ppo.yaml "$@"
