#!/usr/bin/env bash
# Reproduces one row of docs/zoo.md from the downloads: prepares the data set, checks it, trains, scores, and prints
# the score and the published one. The same command resumes an interrupted one.
#   bash scripts/reproduce.sh ROW --downloads DIR [--backbone FILE] [--work DIR] [--config.KEY=VALUE ...]
# --downloads holds the data set's official archives (docs/data.md); --config.data.root=DIR names a finished folder instead.
# --backbone names the weights that training starts from, such as the published ImageNet classifier ("fresh": random
# weights); --work (default: reproduce) is the folder for data and runs.
set -euo pipefail
cd "$(dirname "$0")/.."

# row, recipe, data set, weights to start from, published score in percent, settings
ROWS="
t_ade topformer_t_ade ade20k backbone 33.6
t_ade_4x8 topformer_t_ade ade20k backbone 34.6 --config.batch_size=32
s_ade topformer_s_ade ade20k backbone 36.5
s_ade_4x8 topformer_s_ade ade20k backbone 37.0 --config.batch_size=32
b_ade topformer_b_ade ade20k backbone 38.3
b_ade_4x8 topformer_b_ade ade20k backbone 39.2 --config.batch_size=32
t_ade448 topformer_t_ade448 ade20k backbone 32.5
t_ade448_4x8 topformer_t_ade448 ade20k backbone 33.4 --config.batch_size=32
b_cityscapes topformer_b_cityscapes cityscapes backbone 70.7
t_context60 topformer_t_context60 context60 backbone 36.4
t_context59 topformer_t_context59 context59 backbone 40.4
t_cocostuff10k topformer_t_cocostuff10k cocostuff10k backbone 28.3
b_cocostuff10k topformer_b_cocostuff10k cocostuff10k backbone 33.4
t_imagenet topformer_t_imagenet imagenet fresh 66.2
s_imagenet topformer_s_imagenet imagenet fresh 72.3
b_imagenet topformer_b_imagenet imagenet fresh 75.3
t_camvid topformer_t_camvid camvid fresh -
s_camvid topformer_s_camvid camvid fresh -
b_camvid topformer_b_camvid camvid fresh -
"

fail() {
    echo "error: $1" >&2
    exit 2
}

row=${1:-}
read -r _ recipe data_set start published settings < <(grep "^$row " <<<"$ROWS") ||
    fail "there is no row '$row': expected one of $(cut -d' ' -f1 <<<"$ROWS" | xargs)"
shift
downloads='' backbone='' work=reproduce changes=()
while [ $# -gt 0 ]; do
    case $1 in
        --downloads | --backbone | --work)
            [ $# -gt 1 ] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        --config.*=*) changes+=("$1") ;;
        *) fail "unknown flag $1: expected --downloads, --backbone, --work or --config.KEY=VALUE" ;;
    esac
    shift
done
[ -n "$downloads" ] || [[ "${changes[*]}" == *--config.data.root=* ]] ||
    fail "--downloads DIR is missing: the folder with the official archives of $data_set"
[ -n "$backbone" ] || [ "$start" = fresh ] ||
    fail "the published row starts from ImageNet weights: give --backbone FILE, or --backbone fresh for random ones"

python -c 'import topformer_jax' 2>/dev/null || {
    source scripts/_venv.sh
    install_into_venv '.[convert]'
}
read -ra settings <<<"$settings"
flags=(--config "$recipe" "--config.data.root=$work/data/$data_set" "${settings[@]}" "${changes[@]}")
run=$work/runs/$row

if [ -n "$downloads" ]; then
    python -m topformer_jax.prepare "$data_set" --source "$downloads" --output "$work/data/$data_set"
fi
if ! grep -qs '"would_start": true' "$run/check/report.json"; then # reads every image: once is enough
    python -m topformer_jax.check "${flags[@]}" --output "$run/check"
fi
if [ -n "$backbone" ] && [ "$backbone" != fresh ]; then
    python -m topformer_jax.train "${flags[@]}" --workdir "$run" \
        --config.init_part=backbone "--config.init_from=$backbone"
else
    python -m topformer_jax.train "${flags[@]}" --workdir "$run"
fi
python -m topformer_jax.evaluate "${flags[@]}" --checkpoint "$run" --workdir "$run/evaluate"
python - "$run/evaluate/metrics.json" "$row" "$published" <<'END'
import json
import sys

path, row, published = sys.argv[1:]
with open(path) as file:
    scores = json.load(file)
name, score = ("top-1", scores["top1"]) if "top1" in scores else ("mIoU", scores["mIoU"])
beside = "no published score" if published == "-" else f"published {published} ({100 * score - float(published):+.1f})"
print(f"{row}: {name} {100 * score:.1f}, {beside}")
END
