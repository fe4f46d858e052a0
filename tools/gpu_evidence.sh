#!/usr/bin/env bash
# tools/gpu_evidence.sh OUT [PART ...]        (one GPU, no network, at most 30 minutes; without PART all of them)
# What this project claims of GPUs, measured on one: the tests marked gpu, the kernels, decoding with CUDA graphs and
# without, iterations of PPO in bf16 and FP8, and the doctor. Each part has a time limit of its own, writes its log and
# its JSON to OUT, and cannot stop the others; OUT/parts.jsonl says how each ended.
# MODEL is a preset (llama3.2-1b), ROLLOUTS (128) of at most TOKENS (256) are an iteration, PYTHON is the interpreter. WHEELS names a folder of wheels to install first, beside the
# torch that is there (docs/install.md, a machine without a network).
set -uo pipefail
[ $# -gt 0 ] || { echo "usage: tools/gpu_evidence.sh OUT [PART ...]" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
model=${MODEL:-llama3.2-1b} rollouts=${ROLLOUTS:-128}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=agg

# part NAME LIMIT_S COMMAND ...: run it, keep what it says, note how it ended.
asked=("$@")
failed=()
part() {
  local name=$1 limit=$2 begun=$SECONDS code=0
  shift 2
  [ ${#asked[@]} -eq 0 ] || [[ " ${asked[*]} " == *" $name "* ]] || return 0
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  printf '{"part": "%s", "exit_code": %d, "seconds": %d, "limit_s": %d}\n' "$name" "$code" $((SECONDS - begun)) "$limit" \
    | tee -a "$out/parts.jsonl"
  [ "$code" -eq 0 ] || { failed+=("$name"); tail -n 3 "$out/$name.log"; }
}

# Whole iterations, with random weights; the arguments go on top.
iterations() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" tools/bench_throughput.py ppo "actor.init=$model" "reward.init=$model" \
    "rollout_batch=$rollouts" "global_batch=$((rollouts / 2))" "micro_batch=$((rollouts / 8))" ppo_epochs=1 \
    prompts.max_tokens=64 "sampling.max_new_tokens=${TOKENS:-256}" \
    --prompts uniform:16:64 --iterations 3 --json "$out/$name.json" "$@"
}

if [ -n "${WHEELS:-}" ]; then
  part unpack 120 "$python" -m venv --system-site-packages "$out/environment"
  part wheels 240 "$out/environment/bin/python" -m pip install --no-index --find-links "$WHEELS" .
  python=$out/environment/bin/python
fi
part doctor_fp32 120 "$python" -m megarlhf.cli doctor compute.dtype=float32 "run_dir=$out/doctor_fp32"
part doctor 120 "$python" -m megarlhf.cli doctor "run_dir=$out/doctor"
part tests 240 "$python" -m pytest -q -p no:cacheprovider -m gpu "--junitxml=$out/tests.xml" tests
part kernels 240 "$python" tools/bench_kernels.py --repeats 3 --json "$out/kernels.json"
iterations decode_eager 150 compute.cuda_graphs=false offload=none rollout.keep=true
iterations decode_graphs 150 compute.cuda_graphs=true offload=none rollout.keep=true
iterations ppo_bf16 150
iterations ppo_fp8 150 compute.fp8=hybrid
if [ -f "$out/decode_eager.json" ] && [ -f "$out/decode_graphs.json" ]; then
  part graphs_or_not 30 "$python" tools/compare_bench.py "$out/decode_eager.json" "$out/decode_graphs.json"
fi

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}; logs are in $out"; exit 1; }
