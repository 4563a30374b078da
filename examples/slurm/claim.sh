#!/bin/sh
# One GPU of the pool, with the model `chat` of the files on its hosts, for as long as the job runs.
#
#   sbatch claim.sh                 one claim
#   sbatch --array=1-6 claim.sh     six claims, each a job of its own
#   scancel JOB                     releases it: the job ends when its GPU is free again
#
# Its user is in the group mic on the hosts. The resource and the exit codes are those of slurm.conf
# beside this file; see docs/many-machines.md.
#SBATCH --job-name=chat
#SBATCH --gres=mic:1
#SBATCH --ntasks=1
#SBATCH --mem=100
#SBATCH --time=UNLIMITED
#SBATCH --requeue
#SBATCH --open-mode=append

# exec: the claim itself gets the signals.
exec mic-supervisor claim chat --holder "job $SLURM_JOB_ID"
