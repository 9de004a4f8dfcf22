#!/bin/sh
# Builds and runs the runner with each compiler: `make portable`. Prints a line for each; what one of them prints besides is a failure's.
# $1 says how many problems a table and type the native runs take.
set -eu
cd "$(dirname "$0")/../.."

for tool in cmake "${CXX:-g++}" clang++-16 qemu-aarch64 aarch64-linux-gnu-g++; do
  command -v "$tool" > /dev/null && continue
  echo "make portable: $tool must be there: apt-get install clang-16 qemu-user g++-aarch64-linux-gnu" >&2
  exit 1
done

run() { # name, cases, emulator, options of cmake
  name=$1 cases=$2 emulator=$3
  shift 3
  build=build/portable/$name
  mkdir -p "$build"
  from=$(date +%s)
  { cmake -S . -B "$build" -DOMNICONV_OPTIMIZATION=-O1 "$@" && cmake --build "$build" --target portable --parallel "${CORES:-2}"; } \
    > "$build/log" 2>&1 || { cat "$build/log"; exit 1; }
  printf '%-30s built in %3d s, ' "$name" $(($(date +%s) - from))
  $emulator "$build/portable" "$cases"
}

run "${CXX:-g++}" "${1:-300}" "" -DCMAKE_CXX_COMPILER="${CXX:-g++}" -DCMAKE_C_COMPILER="${CC:-cc}"
run clang++-16 "${1:-300}" "" -DCMAKE_CXX_COMPILER=clang++-16 -DCMAKE_C_COMPILER=clang-16
run aarch64-linux-gnu-g++ 60 "qemu-aarch64 -L /usr/aarch64-linux-gnu" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc
