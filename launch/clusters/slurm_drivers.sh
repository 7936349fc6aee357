#!/usr/bin/env bash
# One sweep by several drivers, each a task of a Slurm job array with a Ray of its own, that share one database. They
# start and end on their own, on any machines, and a driver that has gone loses its trials to the others.
#   export SYNQ_STUDY_STORAGE=postgresql://USER:PASSWORD@HOST/NAME
#   sbatch --array=0-7 launch/clusters/slurm_drivers.sh SPEC --output-dir FOLDER
# SPEC has study_storage = "$SYNQ_STUDY_STORAGE". Submit it from an activated environment that all machines see.
#SBATCH --job-name=synq-drivers
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "usage: sbatch slurm_drivers.sh SPEC [options of synq sweep]" >&2
    exit 2
fi
if [ -z "${SYNQ_STUDY_STORAGE:-}" ]; then
    echo "slurm_drivers: SYNQ_STUDY_STORAGE must name the database that the drivers share, but is not set" >&2
    exit 2
fi
unset RAY_ADDRESS # each driver starts Ray on its machine, on loopback

stopped=0
# Ray counts the cores of the whole machine, of which this task has some; options that are given go before these.
synq sweep "$1" --max-concurrent "${SLURM_CPUS_PER_TASK:-1}" "${@:2}" &
driver=$!
# shellcheck disable=SC2317 # called by the traps
end_driver() {
    kill -TERM "$driver" 2>/dev/null || true
}
trap 'stopped=1; end_driver' USR1 # before the time limit
trap end_driver TERM              # scancel
while :; do # a trapped signal ends `wait` early
    code=0
    wait "$driver" || code=$?
    kill -0 "$driver" 2>/dev/null || break
done
if [ "$stopped" -eq 1 ] && [ "$code" -ne 0 ]; then
    echo "slurm_drivers: stopped before the time limit; the task is queued again and joins the sweep"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
