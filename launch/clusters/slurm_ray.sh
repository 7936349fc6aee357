#!/usr/bin/env bash
# One sweep on all machines of a Slurm job: Ray's head and the driver on the first, a worker on each other one.
#   sbatch --nodes=4 launch/clusters/slurm_ray.sh SPEC --output-dir FOLDER
#   sbatch --gpus-per-node=2 launch/clusters/slurm_ray.sh SPEC --output-dir FOLDER --gpus-per-worker 1
# Submit it from an activated environment on a file system that all machines share; FOLDER must be on one, too (or an
# address such as s3://bucket/path). Before the time limit the sweep is stopped and the job queued again, and it resumes.
#SBATCH --job-name=synq-sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "usage: sbatch slurm_ray.sh SPEC [options of synq sweep]" >&2
    exit 2
fi
cpus="${SLURM_CPUS_PER_TASK:-1}"
gpus="${SLURM_GPUS_ON_NODE:-0}"
port="${RAY_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" # two jobs on one machine need two ports
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The address of this machine, the first of the job; set HEAD_IP where the machines talk over another network.
head_ip="${HEAD_IP:-$(hostname --ip-address | tr ' ' '\n' | grep -m 1 -E '^[0-9.]+$' || true)}"
if [ -z "$head_ip" ]; then
    echo "slurm_ray: HEAD_IP must be the address of the first machine, because its host name has none of IPv4" >&2
    exit 2
fi

# Other users reach the ports of this job, so only processes with its token may use them.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
    export RAY_AUTH_TOKEN # steps of srun inherit it; it is on no command line
fi
export RAY_USAGE_STATS_ENABLED=0

steps=()
# shellcheck disable=SC2317 # called by the trap
stop_ray() {
    trap - EXIT
    [ "${#steps[@]}" -eq 0 ] || kill -TERM "${steps[@]}" 2>/dev/null || true
    wait
}
trap stop_ray EXIT

each=(srun --overlap --ntasks-per-node=1 "--cpus-per-task=$cpus")
ray_options=("--num-cpus=$cpus" "--num-gpus=$gpus" --block)
"${each[@]}" --nodes=1 --ntasks=1 "--nodelist=${nodes[0]}" \
    ray start --head "--node-ip-address=$head_ip" "--port=$port" --include-dashboard=true "${ray_options[@]}" &
steps+=("$!")
others=$((${#nodes[@]} - 1))
export RAY_ADDRESS="$head_ip:$port"

# wait_for N: return once Ray has N machines; workers that start before their head would give up.
wait_for() {
    python - "$1" <<'PYTHON' &
import sys, time
import ray

wanted, end, found = int(sys.argv[1]), time.monotonic() + 300, 0
while time.monotonic() < end:
    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
        while time.monotonic() < end:
            found = sum(node["Alive"] for node in ray.nodes())
            if found >= wanted:
                sys.exit(0)
            time.sleep(1)
    except ConnectionError:
        time.sleep(2)
sys.exit(f"slurm_ray: Ray must have {wanted} machines, but got {found} after 300 s; see the lines above")
PYTHON
    local waiter="$!" step
    while kill -0 "$waiter" 2>/dev/null; do
        for step in "${steps[@]}"; do
            if ! kill -0 "$step" 2>/dev/null; then
                kill "$waiter" 2>/dev/null || true
                echo "slurm_ray: a step of srun with Ray ended before the sweep began; see the lines above" >&2
                exit 1
            fi
        done
        sleep 1
    done
    wait "$waiter"
}

wait_for 1
if [ "$others" -gt 0 ]; then
    "${each[@]}" "--nodes=$others" "--ntasks=$others" "--exclude=${nodes[0]}" \
        ray start "--address=$RAY_ADDRESS" "${ray_options[@]}" &
    steps+=("$!")
    wait_for "${#nodes[@]}"
fi

stopped=0
synq sweep "$@" &
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
    echo "slurm_ray: stopped before the time limit; the job is queued again and resumes the sweep"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
