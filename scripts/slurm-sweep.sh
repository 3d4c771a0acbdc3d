#!/usr/bin/env bash
# A sweep on a Slurm cluster: an array job with a task for each shard that is not complete, and a job that merges when all of
# them are. The same command again submits only what is missing.
#
#   scripts/slurm-sweep.sh configs/sweep.yaml 64 --partition=cpu --cpus-per-task=8 --time=2:00:00
#
# What follows the sweep and the number of shards goes to sbatch. RESULTS is the folder of the results (default: results/ and
# the name of the sweep), which all nodes must see; DEPTHWISE the program (default: depthwise). Logs are beside the shards.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 SWEEP.yaml SHARDS [OPTION OF sbatch]..." >&2
    exit 2
fi
sweep=$1 shards=$2
shift 2
[ -f "$sweep" ] || { echo "$sweep: no such file, expected a sweep in YAML" >&2; exit 1; }
program=${DEPTHWISE:-depthwise}
command -v "$program" > /dev/null || { echo "$program: not found, expected the program in DEPTHWISE" >&2; exit 1; }
name=$(basename "$sweep")
results=${RESULTS:-results/${name%.*}}
parts=$results-shards
mkdir -p "$parts"

missing=()
folders=()
for ((shard = 1; shard <= shards; shard++)); do
    folder=$parts/$shard-of-$shards
    folders+=("$folder")
    grep -qs '"complete": true' "$folder/depthwise-results.json" || missing+=("$shard")
done

submit=(sbatch --parsable --job-name="$name" "$@")
# Slurm runs a copy of the command in this folder.
task='RAYON_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} exec'
dependency=()
if [ ${#missing[@]} -gt 0 ]; then
    array=$(IFS=,; echo "${missing[*]}")
    command=$(printf '%q sweep %q --shard "$SLURM_ARRAY_TASK_ID/%d" --out %q/"$SLURM_ARRAY_TASK_ID-of-%d"' \
        "$program" "$sweep" "$shards" "$parts" "$shards")
    job=$("${submit[@]}" --array="$array" --requeue --output="$parts/%a-of-$shards.log" --wrap="$task $command")
    job=${job%%;*}
    dependency=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
    echo "${#missing[@]} of $shards shards: job $job"
else
    echo "all $shards shards are complete"
fi
command=$(printf '%q sweep %q --out %q --merge' "$program" "$sweep" "$results"; printf ' %q' "${folders[@]}")
job=$("${submit[@]}" "${dependency[@]}" --output="$parts/merge.log" --wrap="$task $command")
echo "merge into $results: job ${job%%;*}"
