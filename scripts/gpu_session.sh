#!/usr/bin/env bash
# What a machine with a CUDA GPU is wanted for, in one go: each stage under a time limit of its own, so that a stage that
# fails costs no other one. Logs and JSON go to OUT.
#
#   scripts/gpu_session.sh OUT                      all stages, about 25 minutes
#   scripts/gpu_session.sh OUT tests models         some of them
#   DEVICE=cpu QUICK=1 scripts/gpu_session.sh OUT   the same commands in small, to see that they run
#
# CIFAR=FOLDER names the CIFAR-10 images as FOLDER/{train,test}/<class>/*.jpg, for the stage `speedrun`.
set -uo pipefail

out=$(mkdir -p "${1:?expected a folder for the results}" && cd "$1" && pwd)
shift
stages=("$@")
[ $# -gt 0 ] || stages=(tests models peers large statistics roofline stream speedrun)
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=${PYTHONPATH:-}:$PWD PYTHONUNBUFFERED=1 CNNLAB_CACHE=${CNNLAB_CACHE:-$out/cache}

rounds=(--rounds 8 --seconds 1 --batch 512) large=(--rounds 8 --seconds 1 --batch 256) turns=(--rounds 10 --seconds 1)
families=alexnet,vgg,inception,resnet,resnet18,resnet20,vgg16,inception_v3,speednet,cnn,mlp
images=data.train=20000 steps=trainer.epochs=1 seeds=0,1,2,3,4 batch=256
if [ -n "${QUICK:-}" ]; then
  rounds=(--rounds 1 --seconds 0.1 --batch 16) large=("${rounds[@]}") turns=(--rounds 1 --seconds 0.1)
  families=cnn,resnet images=data.train=64 steps=trainer.max_steps=2 seeds=0 batch=8
fi
cnnlab=("$python" -m cnnlab)
peers=("$python" scripts/bench_peers.py --device "$device")
arms=("bare loop" "bare loop, compiled" "bare loop, CUDA graph" "timm, equal" "Lightning, equal")
common=("trainer.device=$device" trainer.progress=false "paths.outputs=$out/runs")

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  [[ " ${stages[*]} " == *" ${name%%-*} "* ]] || return 0
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit $? after $((SECONDS - began)) s" | tee -a "$out/stages.log"
}

stage tests 480 "$python" -m pytest -m gpu -q -p no:cacheprovider
for precision in bf16 fp16; do
  stage models-$precision 300 "${cnnlab[@]}" train -m "model=$families" "trainer.precision=$precision" "$steps" \
    data=shapes "data.size=64" "$images" "${common[@]}"
done
stage peers 420 "${peers[@]}" --cells alexnet vgg16_bn inception resnet20 resnet18 --arms "${arms[@]}" "${rounds[@]}" \
  --json "$out/peers.json"
stage large 240 "${peers[@]}" --cells resnet50-224 --arms "${arms[@]}" "${large[@]}" --json "$out/large.json"
stage statistics 120 "${peers[@]}" --cells resnet20 --arms "cnnlab train, stats=off" "cnnlab train, again" \
  "${rounds[@]}" --json "$out/statistics.json"
for model in resnet50 resnet18; do
  stage roofline-$model 150 "${cnnlab[@]}" bench "model=$model" data=shapes data.size=224 data.train=2048 \
    "trainer.batch_size=$batch" "trainer.device=$device" "${turns[@]}"
done
if [ -n "${CIFAR:-}" ]; then
  stage stream 180 "${cnnlab[@]}" bench model=resnet50 data=folder "data.root=$CIFAR" data.size=224 loading.path=stream \
    "trainer.batch_size=$batch" "trainer.device=$device" "${turns[@]}"
  stage speedrun 240 "${cnnlab[@]}" train -m experiment=cifar10_speedrun data=folder "data.root=$CIFAR" "seed=$seeds" \
    ${QUICK:+trainer.max_steps=2 trainer.batch_size=64 trainer.accumulate=1 data.limit=640} "${common[@]}"
fi
rm -rf "$out/cache"
cat "$out/stages.log"
