#!/usr/bin/env bash
# HOSTS="node1 node2" examples/launch/torchrun_hosts.sh ppo --config run.yaml [name=value ...]
# torchrun on named hosts, by ssh, without a scheduler. Each host has this directory under the same path, and the same
# Python. RANKS_PER_NODE is 8 unless you say; SSH is what reaches a host. Ctrl-C, or the end of this script, has the run
# save and stop on every host.
set -euo pipefail
[ $# -gt 0 ] && [ -n "${HOSTS:-}" ] \
  || { echo 'usage: HOSTS="node1 node2" torchrun_hosts.sh COMMAND --config FILE [name=value ...]' >&2; exit 2; }
read -ra hosts <<< "$HOSTS"
read -ra ssh <<< "${SSH:-ssh -o BatchMode=yes}"
logs=${LOGS:-logs}/$(date +%Y%m%d_%H%M%S)
mkdir -p "$logs"
echo "${#hosts[@]} hosts, rank 0 on ${hosts[0]}, logs in $logs"

# The words of a command, quoted for the shell that ssh starts.
words() { printf '%q ' "$@"; }

# On a host: torchrun, told to stop once nothing holds the other end of its input.
there='cd "$1" || exit; shift; exec 3<&0
"$@" < /dev/null & run=$!
{ read -r <&3; kill -TERM $run; } 2> /dev/null & watch=$!
wait $run; code=$?; kill $watch; exit $code'
# This script alone holds it, so that it is let go of however this ends.
mkfifo "$logs/alive"
exec 3<> "$logs/alive"
trap 'exec 3>&-; echo "stopping"' INT TERM

tasks=()
for node in "${!hosts[@]}"; do
  command=$(words bash -c "$there" there "$PWD" env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
    "${PYTHON:-python}" -m megarlhf.parallel.torchrun --nnodes="${#hosts[@]}" --node-rank="$node" \
    --nproc-per-node="${RANKS_PER_NODE:-8}" --master-addr="${hosts[0]}" --master-port="${MASTER_PORT:-29500}" \
    -m megarlhf.cli "$@")
  "${ssh[@]}" "${hosts[$node]}" "$command" < "$logs/alive" 3>&- > "$logs/node_$node.log" 2>&1 &
  tasks+=($!)
done

# The first that fails decides; a stop (75) of all is one. A signal ends a wait, and not the task.
code=0
for task in "${tasks[@]}"; do
  last=0
  wait "$task" || last=$?
  while kill -0 "$task" 2> /dev/null; do last=0; wait "$task" || last=$?; done
  [ "$code" -ne 0 ] || code=$last
done
rm "$logs/alive"
tail -n 3 "$logs/node_0.log"
exit "$code"
