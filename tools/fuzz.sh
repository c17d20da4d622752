#!/usr/bin/env bash
# Fuzzes the decoder: tools/fuzz.sh [SECONDS in all, default 60] [TARGET ...]
#
# Targets are csrc/png/fuzz/*.cpp. Each is built with ASan and UBSan, replays the crashes of the past and the seeds
# (csrc/png/fuzz/corpus), then runs for its share of the time; the corpus it gathers stays in build/fuzz, the next run goes
# on from there. A new crash lands in csrc/png/fuzz/crashes, to be committed with its fix, and ends the run, exit code 1.
# Needs clang with libFuzzer (Debian: clang, libclang-rt-14-dev), zlib and libpng (zlib1g-dev, libpng-dev).
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(decode inflate pixels)
build=build/fuzz
compiler=${CLANGXX:-clang++}
command -v "$compiler" >/dev/null || { echo "tools/fuzz.sh: $compiler is absent; install clang (Debian: clang libclang-rt-14-dev)" >&2; exit 2; }

checks=(-std=c++20 -O2 -g -Icsrc -I. -fsanitize=address,undefined -fno-sanitize-recover=undefined)
# Only the decoder is instrumented, and not its comparisons: those calls would take two thirds of the time, and the seeds
# hold the magic values already.
coverage=(-fsanitize-coverage=inline-8bit-counters,pc-table)
mkdir -p "$build/objects"
objects=()
for source in csrc/png/*.cpp; do
  [ "$source" = csrc/png/bind.cpp ] && continue
  object=$build/objects/$(basename "$source" .cpp).o
  objects+=("$object")
  if [ ! -e "$object" ] || [ -n "$(find csrc/png -maxdepth 1 -newer "$object" -print -quit)" ]; then
    "$compiler" "${checks[@]}" "${coverage[@]}" -c "$source" -o "$object"
  fi
done

status=0
for target in "${targets[@]}"; do
  "$compiler" "${checks[@]}" -fsanitize=fuzzer "csrc/png/fuzz/$target.cpp" "${objects[@]}" -lz -lpng -o "$build/$target" \
    -fno-sanitize-coverage=inline-8bit-counters,pc-table,trace-cmp,indirect-calls
  crashes=csrc/png/fuzz/crashes/$target
  corpus=$build/corpus/$target
  mkdir -p "$crashes" "$corpus"
  ${PYTHON:-python3} -m zipfile -e "csrc/png/fuzz/corpus/$target.zip" "$corpus"
  find "$crashes" -type f -print0 | xargs -0 -r "$build/$target" >"$build/$target.log" 2>&1 ||
    { tail -n 30 "$build/$target.log" >&2; echo "$target: a crash of the past is back" >&2; exit 1; }
  share=$((seconds / ${#targets[@]}))
  ASAN_OPTIONS=quarantine_size_mb=8:malloc_context_size=4 "$build/$target" \
    -max_total_time=$((share > 0 ? share : 1)) -max_len=4096 -print_final_stats=1 -verbosity=0 \
    -artifact_prefix="$crashes/" "$corpus" >"$build/$target.log" 2>&1 || status=1
  executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$build/$target.log")
  echo "$target: ${executions:-0} executions in $share s, $(find "$corpus" -type f | wc -l) inputs in the corpus"
  [ $status -eq 0 ] || { tail -n 40 "$build/$target.log" >&2; exit 1; }
done
