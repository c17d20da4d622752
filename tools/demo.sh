#!/usr/bin/env bash
# The whole road on synthetic films, in a few minutes on two cores: films -> store -> both CNNs -> tables and figures.
# Every step goes on where it stopped when the demo is started again.
#   tools/demo.sh BIN FOLDER     BIN: where the cxrfast commands are; FOLDER: what the demo writes
set -euo pipefail
bin=$1 folder=$2
recipe=(--epochs 8 --resume)

"$bin/cxrfast-doctor" | head -n -1
"$bin/cxrfast-phantoms" "$folder/films" --images 600 --seed 1
"$bin/cxrfast-prep" "$folder/films" "$folder/store" --size 64
for model in cnn multimodal; do
  "$bin/cxrfast-train" "$folder/store" "$folder/$model" --model "$model" "${recipe[@]}"
done
"$bin/cxrfast-eval" "$folder/cnn" "$folder/multimodal"

cat <<END

Done. Look at:
  $folder/films                 600 synthetic films in NIH's layout
  $folder/store/ledger.csv      what became of each film
  $folder/cnn/eval/             tables and figures of the image CNN
  $folder/multimodal/eval/      tables and figures of the multimodal CNN
END
