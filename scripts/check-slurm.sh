#!/usr/bin/env bash
# Tests scripts/slurm-sweep.sh on a real Slurm of two nodes on this machine (Debian: apt-get install slurm-wlm munge), as root:
# a sweep of 5,000 points in 20 shards, with a worker killed in the middle, is merged to the bytes of one run.
#
#   scripts/check-slurm.sh target/release/depthwise
set -euo pipefail
cd "$(dirname "$0")/.."
program=$(realpath "${1:-target/release/depthwise}")
repository=$PWD
for command in munged slurmctld slurmd sbatch; do
    command -v $command > /dev/null || { echo "SKIPPED: $command is not installed" >&2; exit 0; }
done
scene=$(mktemp -d)
chmod 755 "$scene"
pids=()
end() {
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
    wait 2> /dev/null || true
    [ -n "${KEEP:-}" ] || rm -rf "$scene"
}
trap end EXIT

# Munge, with a key and a socket of its own.
mkdir -m 755 "$scene/munge"
chown munge: "$scene/munge"
(umask 077; head -c 1024 /dev/urandom > "$scene/munge/key"; chown munge: "$scene/munge/key")
runuser -u munge -- /usr/sbin/munged --foreground --key-file="$scene/munge/key" --socket="$scene/munge/socket" \
    --pid-file="$scene/munge/pid" --log-file="$scene/munge/log" --seed-file="$scene/munge/seed" 2> "$scene/munge.log" &
pids+=($!)

# Two nodes and a partition of each, without an account database. Nodes are told apart by their ports.
host=$(hostname -s)
mkdir -p "$scene/state" "$scene/spool-one" "$scene/spool-two"
cat > "$scene/slurm.conf" <<CONF
ClusterName=check
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$scene/munge/socket
CredType=cred/munge
StateSaveLocation=$scene/state
SlurmdSpoolDir=$scene/spool-%n
SlurmctldPidFile=$scene/slurmctld.pid
SlurmdPidFile=$scene/slurmd-%n.pid
SlurmctldLogFile=$scene/slurmctld.log
SlurmdLogFile=$scene/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=1
MinJobAge=600
NodeName=one NodeHostname=$host NodeAddr=127.0.0.1 Port=16818 CPUs=1 RealMemory=1000
NodeName=two NodeHostname=$host NodeAddr=127.0.0.1 Port=16819 CPUs=1 RealMemory=1000
PartitionName=both Nodes=one,two Default=YES State=UP
PartitionName=first Nodes=one State=UP
PartitionName=second Nodes=two State=UP
CONF
export SLURM_CONF=$scene/slurm.conf
slurmctld -D -i 2> "$scene/slurmctld.err" &
pids+=($!)
for node in one two; do
    slurmd -D -N $node 2> "$scene/slurmd-$node.err" &
    pids+=($!)
    eval "slurmd_$node=$!"
done
for ((second = 0; second < 60; second++)); do
    [ "$(sinfo -h -N -p both -t idle -o %N 2> /dev/null | sort -u | wc -l)" -eq 2 ] && break
    sleep 1
done
sinfo || true
if [ "$(sinfo -h -N -p both -t idle -o %N | sort -u | wc -l)" -ne 2 ]; then
    tail -n 20 "$scene"/*.log "$scene"/*.err >&2
    echo "FAILED: Slurm's two nodes did not become idle" >&2
    exit 1
fi

cd "$scene"
python3 - "$repository" <<'PY'
import sys
repository = sys.argv[1]
seeds = ", ".join(str(seed) for seed in range(1, 501))
open("many.yaml", "w").write(f"""schema_version: 1
title: five thousand points
requests:
  generate:
    count: 60
    arrivals: {{poisson: {{rate_per_s: 40}}}}
    prompt_tokens: {{fixed: 1}}
    output_tokens: {{log_normal: {{median: 30, sigma: 0.4}}}}
serving: {{batching: [sequence, depth], exit: [none, oracle, 'margin:0.05', 'margin:0.1', 'top1:0.3'], max_batch: 41, token_budget: 41}}
systems:
  - name: relaxed
    profile: {repository}/configs/paper/profiles/gemma-2-loops-rank-64
    exits: {repository}/configs/gpu/exits/2-loops
grid: {{seed: [{seeds}]}}
""")
PY
"$program" sweep many.yaml --out whole > /dev/null
export DEPTHWISE=$program
"$repository/scripts/slurm-sweep.sh" many.yaml 20 --mem=300
# A worker is killed: its shard fails, and the merge is not started. The same command again submits what is missing.
sleep 3
killed=0
while [ $killed -lt 1 ]; do
    worker=$(pgrep -f "$program sweep many.yaml --shard" | head -n 1 || true)
    if [ -n "$worker" ]; then
        kill -KILL "$worker" && killed=1 && echo "killed worker $worker"
    fi
    sleep 0.1
done
jobs_left() { squeue -h -t pending,running,completing,configuring | wc -l; }
for ((second = 0; second < 600 && $(jobs_left) > 0; second++)); do sleep 1; done
if cmp -s whole/sweep.csv results/many/sweep.csv; then
    echo "FAILED: the worker was killed too late to matter" >&2
    exit 1
fi
echo "complete shards after the kill: $(grep -ls '"complete": true' results/many-shards/*/depthwise-results.json | wc -l) of 20"
"$repository/scripts/slurm-sweep.sh" many.yaml 20 --mem=300
for ((second = 0; second < 600 && $(jobs_left) > 0; second++)); do sleep 1; done
cat results/many-shards/merge.log
diff -r whole results/many
echo "PASSED: $(($(wc -l < results/many/sweep.csv) - 1)) points, merged on Slurm, equal one run byte by byte"
