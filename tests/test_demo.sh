#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Tests of the examples and the demo: that all modes train alike, that the gradients are right, and that bad
# input is refused in one line. Nothing here depends on time.
#
# Run in the build directory. SEBP_TEST_DATA: a folder with sst2/, cola/ and bert-base-uncased/;
# without it, and without PyTorch, what needs them is skipped.
# shellcheck disable=SC2016 # the awk programs and the commands for sh -c expand nothing here
set -u

# shellcheck source=tests/checks.sh
. "$(dirname "$0")/checks.sh"

builddir=${top_builddir:-.}
srcdir=${top_srcdir:-$builddir}
demo=$builddir/programs/finetune_bert
sentences=$srcdir/programs/data/sentences.tsv
here=$(cd "$(dirname "$0")" && pwd)

# trains NAME ARGUMENTS...: a small run in all modes whose losses agree to a relative 1e-4, those of
# skipped and packed rows to 1e-5. Leaves losses.csv and plot.svg.
trains() {
    name=$1
    shift
    rm -f "$work/losses.csv" "$work/plot.svg" "$work/table"
    if ! "$demo" --mode all --layers 2 --hidden 24 --heads 3 --batch 4 --steps 6 \
        --learning-rate 2e-3 --csv "$work/losses.csv" --plot "$work/plot.svg" "$@" \
        >"$work/table" 2>"$work/log"; then
        fail "$name"
        sed 's/^/    /' "$work/log"
        return
    fi
    check "$name: losses agree" awk -F, '
        function apart(a, b) { return a > b ? a - b : b - a }
        NR == 1 { bad = $0 != "step,dense,sebp,skipped,packed" }
        NR > 1 {
            if (NF != 5 || $1 != NR - 1 || !($2 > 0.01 && $2 < 20) || !($5 > 0) ||
                apart($2, $3) > 1e-4 * $2 || apart($2, $4) > 1e-4 * $2 ||
                apart($4, $5) > 1e-5 * $2) { print; bad = 1 }
            differs += $2 != last
            last = $2
        }
        END { exit bad || NR != 7 || differs != 6 }' "$work/losses.csv"
}

# refused NAME STATUS MESSAGE ARGUMENTS...: exits with the status and that one line, writes nothing.
refused() {
    name=$1 status=$2 message=$3
    shift 3
    mkdir "$work/empty"
    (cd "$work/empty" && "$demo" "$@" >../out 2>../log)
    found=$?
    written=$(ls "$work/empty")
    rm -rf "$work/empty"
    printf 'finetune_bert: %s\n' "$message" >"$work/expected"
    if [ "$found" -eq "$status" ] && [ -z "$written" ] && [ ! -s "$work/out" ] &&
        cmp -s "$work/expected" "$work/log"; then
        pass
    else
        fail "$name: exit status $found, files '$written', message:"
        sed 's/^/    /' "$work/log"
    fi
}

# bad_line NAME WHAT: the file $work/bad.tsv, just written, is refused for what stands in line 2.
bad_line() {
    refused "$1" 2 "$work/bad.tsv:2: $2" --train "$work/bad.tsv"
}

case $builddir in
/*) ;;
*) demo=$PWD/$demo ;;
esac
if [ ! -x "$demo" ]; then
    echo "no $demo"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi

# What a user sees first.
check "--help" "$demo" --help

# Each example runs and says something; those that train learn.
for source in "$srcdir"/examples/0*.c; do
    example=$(basename "$source" .c)
    "$builddir/examples/$example" >"$work/out" 2>"$work/log"
    status=$?
    if [ "$status" -eq 77 ]; then
        skip "example $example: $(cat "$work/log")"
    elif [ "$status" -eq 0 ] && [ -s "$work/out" ] && [ ! -s "$work/log" ] &&
        ! grep -q -w -E 'nan|inf|NOT' "$work/out"; then
        pass
        cp "$work/out" "$work/$example.txt"
    else
        fail "example $example: exit status $status"
        sed 's/^/    /' "$work/out" "$work/log"
    fi
done

check "03_training: both ways learn the same" awk '
    { for (i = 1; i < NF; i++) if ($i == "loss") last[NR] = $(i + 1) }
    END {
        apart = last[1] - last[2]
        exit NR != 2 || !(last[1] < 0.01 && last[2] < 0.01 && apart < 1e-3 && apart > -1e-3)
    }' "$work/03_training.txt"
for example in 06_lora 07_sparsegrad; do
    test -f "$work/$example.txt" || continue # skipped above
    check "$example learns" awk '
        /loss/ { last = $0; sub(/.*loss /, "", last); steps++; if (steps == 1) first = last + 0 }
        END { exit steps < 4 || !(last + 0 < 0.01 * first) }' "$work/$example.txt"
done

# The gradients, in every mode, by finite differences.
for seed in 1 2 3; do
    check "gradients, seed $seed" "$demo" --check-gradients --seed "$seed"
done

# All modes train alike, whatever the shape; the plot and the table are whole.
trains "the default sentences" --max-length 40 --dump-parameters "$work/dump"
cp "$work/losses.csv" "$work/first.csv"
if command -v xmllint >/dev/null; then
    check "the plot is XML" xmllint --noout "$work/plot.svg"
else
    check "the plot ends" grep -q '^</svg>$' "$work/plot.svg"
fi
check "the plot has four curves" test "$(grep -c '<polyline' "$work/plot.svg")" -eq 4
check "the table has its rows" test "$(grep -c -E '^(speedup of|largest|held-out|activity)' \
    "$work/table")" -eq 5
if python3 -c 'import torch' 2>/dev/null; then
    check "PyTorch's losses" python3 "$here/check_demo_pytorch.py" "$work/dump" "$work/first.csv"
else
    skip "PyTorch's losses: python3 has no torch"
fi
trains "the same again" --max-length 40
check "the same seed gives the same losses" cmp "$work/losses.csv" "$work/first.csv"
trains "another seed" --max-length 40 --seed 2
check "another seed gives other losses" sh -c '! cmp -s "$1" "$2"' - "$work/losses.csv" \
    "$work/first.csv"
trains "sentences that are cut" --max-length 5
trains "a feed-forward width of its own" --feed-forward 37 --max-length 24
check "and it changes the losses" sh -c '! cmp -s "$1" "$2"' - "$work/losses.csv" "$work/first.csv"
trains "one block" --layers 1 --max-length 24

# With dropout the padded modes drop the same elements, and packed drops others.
# dropped NAME ARGUMENTS...: a small run, whose losses are left in dropped.csv.
dropped() {
    name=$1
    shift
    check "$name" "$demo" --layers 2 --hidden 24 --heads 3 --batch 4 --steps 6 --max-length 40 \
        --learning-rate 2e-3 --csv "$work/dropped.csv" --plot "$work/plot.svg" "$@"
}
dropped "without dropout" --mode all
cp "$work/dropped.csv" "$work/kept.csv"
dropped "dropout" --mode all --dropout 0.2
cp "$work/dropped.csv" "$work/dropped-once.csv"
check "dropout: losses agree where the same is dropped, and there alone" awk -F, '
    function apart(a, b) { return (a > b ? a - b : b - a) / b }
    NR == FNR { kept[NR] = $2; next }
    FNR > 1 {
        bad = bad || !(apart($3, $2) <= 1e-4 && apart($4, $2) <= 1e-4)
        others += apart($2, kept[FNR]) > 1e-5
        packed += apart($5, $2) > 1e-5
    }
    END { exit bad || FNR != 7 || others != 6 || packed != 6 }' "$work/kept.csv" "$work/dropped.csv"
dropped "dropout again" --mode all --dropout 0.2
check "the same seed drops the same" cmp "$work/dropped.csv" "$work/dropped-once.csv"

# On a GPU, the emulated one: the same losses in all modes, and gradients that agree.
emulated=$builddir/tests/emulated_finetune
if [ -x "$emulated" ]; then
    for device in cpu cuda; do
        check "training on $device" "$emulated" --device $device --layers 1 --hidden 16 --heads 2 \
            --batch 3 --steps 3 --max-length 12 --train "$sentences" --dropout .1 \
            --csv "$work/$device.csv" --plot "$work/plot.svg"
    done
    check "losses on cpu and cuda" awk -F, '
        function apart(a, b) { return a > b ? a - b : b - a }
        NR == FNR { for (i = 2; i <= NF; i++) first[FNR, i] = $i; next }
        FNR > 1 { for (i = 2; i <= NF; i++) bad += !(apart($i, first[FNR, i]) < 1e-4 * $i) }
        END { exit bad || FNR != 4 || NF != 5 }' "$work/cpu.csv" "$work/cuda.csv"
    # A thousand forwards, on an emulated GPU.
    if [ "${SEBP_TEST_ROUNDS:-100}" -ge 100 ]; then
        check "gradients on a GPU" "$emulated" --device cuda --check-gradients
    else
        skip "gradients on a GPU: SEBP_TEST_ROUNDS is $SEBP_TEST_ROUNDS"
    fi
    refused "CUDA, which there is not" 1 "$(printf '%s: %s' \
        'this build or this machine lacks what was asked for' \
        'sebp_context_create: this build has no CUDA (configure --with-cuda)')" --device cuda
else
    skip "the demo on a GPU: this build has no emulated one"
fi
refused "a device" 2 "--device: 'tpu' is neither cpu nor cuda" --device tpu
refused "dropout of all" 2 "--dropout: 1 is not in [0, 0.9]" --dropout 1
trains "one thread" --threads 1 --max-length 24
trains "three threads" --threads 3 --max-length 24

# Forms of data: a header, CoLA's columns, CRLF, a partial batch, a vocabulary of pieces.
printf 'sentence\tlabel\n' >"$work/header.tsv"
printf 'Unhappily , "NEVER" again!\t0\r\na fine film\t1\r\nfineness\t2\n%s' \
    'café at four	1' >>"$work/header.tsv"
printf 'gj04\t1\t\tIt is fine.\ngj04\t0\t*\tFine is it a.\n' >"$work/four.tsv"
printf '%s\n' '[PAD]' '[UNK]' '[CLS]' '[SEP]' a fine film un '##happi' '##ly' '##ness' , '"' never \
    again '!' it is . >"$work/vocab.txt"
pieces="--vocab $work/vocab.txt --max-length 12 --batch 3 --epochs 3"
# shellcheck disable=SC2086 # the flags are words
{
    trains "header, CRLF, three classes" --train "$work/header.tsv" --dev "$work/header.tsv" \
        $pieces --dump-parameters "$work/dump2"
    sort "$work/dump2/batches.txt" >"$work/batches"
    trains "CoLA's columns" --train "$work/four.tsv" --dev "$work/four.tsv" $pieces --batch 1 \
        --epochs 6
}
# [CLS] un ##happi ##ly , " never " again ! [SEP]; then [CLS] fine ##ness [SEP] and an unknown word.
check "WordPiece" sh -c 'grep -q "^1 0 2 7 8 9 11 12 13 12 14 15 3$" "$1" || exit 1
    grep -q "^[12] 2 2 5 10 3$" "$1" && grep -q "^[12] 1 2 1 1 1 3$" "$1"' - "$work/batches"

# Byte order marks: without them and with them the same, be there a header or none.
cp "$work/losses.csv" "$work/first.csv"
for file in header four vocab; do
    cp "$work/$file.tsv" "$work/plain" 2>/dev/null || cp "$work/$file.txt" "$work/plain"
    { printf '\357\273\277' && cat "$work/plain"; } >"$work/marked-$file"
done
trains "CoLA's columns after a mark" --train "$work/marked-four" --dev "$work/marked-four" \
    --vocab "$work/marked-vocab" --max-length 12 --batch 1 --epochs 6
check "a mark changes nothing" cmp "$work/losses.csv" "$work/first.csv"
# shellcheck disable=SC2086 # the flags are words
trains "a mark before the header" --train "$work/marked-header" --dev "$work/marked-header" \
    $pieces --dump-parameters "$work/dump3"
check "the header is one" cmp "$work/dump2/batches.txt" "$work/dump3/batches.txt"
tail -n +2 "$work/header.tsv" >"$work/plain"
{ printf '\357\273\277' && cat "$work/plain"; } >"$work/marked-first"
for file in plain marked-first; do # the words of the first sentence are in the vocabulary made
    trains "sentences from the first line on: $file" --train "$work/$file" --dev "$work/$file" \
        --max-length 12 --batch 3 --epochs 3 --dump-parameters "$work/dump-$file"
done
check "a mark is no word" cmp "$work/dump-plain/batches.txt" "$work/dump-marked-first/batches.txt"

# Bad options.
refused "unknown option" 2 "unknown option '--hiden' (--help lists them)" --hiden 8
refused "no value" 2 "--hidden: needs a value" --hidden
refused "a value too many" 2 "--help: takes no value" --help=yes
refused "not a number" 2 "--layers: '2x' is not a whole number" --layers 2x
refused "out of range" 2 "--layers: 0 is not in [1, 96]" --layers 0
refused "far out of range" 2 "--seed: 99999999999999999999 is not in [0, 1e+15]" \
    --seed 99999999999999999999
refused "NaN" 2 "--learning-rate: nan is not in [1e-09, 1]" --learning-rate nan
refused "heads" 2 "--heads: 5 do not divide --hidden 64" --hidden 64 --heads 5
refused "mode" 2 "--mode: there is no mode 'fast' (--help lists them)" --mode dense,fast

# Bad data: the message names file and line.
refused "no such file" 2 "$work/none.tsv: No such file or directory" --train "$work/none.tsv"
refused "a folder" 2 "$work: cannot be read: Is a directory" --train "$work"
: >"$work/bad.tsv"
refused "empty file" 2 "$work/bad.tsv: holds no sentences" --train "$work/bad.tsv"
printf 'sentence\tlabel\n' >"$work/bad.tsv"
refused "only a header" 2 "$work/bad.tsv: holds no sentences" --train "$work/bad.tsv"
printf 'a\t1\nb\n' >"$work/bad.tsv"
bad_line "too few columns" "1 columns where 2 or 4 are expected"
printf 'a\t1\nb\t1\t2\n' >"$work/bad.tsv"
bad_line "three columns" "3 columns where 2 or 4 are expected"
printf 'a\t1\nb\t1\t\tc\n' >"$work/bad.tsv"
bad_line "other columns than above" "4 columns where the lines above have 2"
printf 'a\t1\nb\tgood\n' >"$work/bad.tsv"
bad_line "a word as label" "label 'good' is not a whole number from 0 to 99"
printf 'a\t1\nb\t-1\n' >"$work/bad.tsv"
bad_line "a negative label" "label '-1' is not a whole number from 0 to 99"
printf 'a\t1\nb\t100\n' >"$work/bad.tsv"
bad_line "a large label" "label '100' is not a whole number from 0 to 99"
printf 'a\t1\n\t0\n' >"$work/bad.tsv"
bad_line "an empty sentence" "the sentence is empty"
printf 'a\t1\nb\000c\t0\n' >"$work/bad.tsv"
bad_line "a NUL byte" "holds a NUL byte"
printf 'a\t0\nb\t0\n' >"$work/bad.tsv"
refused "one class" 2 "$work/bad.tsv: every label is 0: nothing to learn" --train "$work/bad.tsv"
printf 'a\t0\nb\t1\n' >"$work/bad.tsv"
refused "too few to hold out" 2 "$work/bad.tsv: 2 sentences are too few to hold an eighth out" \
    --train "$work/bad.tsv"
printf 'a\t0\nb\t2\n' >"$work/other.tsv"
refused "a label training lacks" 2 \
    "$work/other.tsv:2: label 2, but the training data has only 0 to 1" \
    --train "$work/bad.tsv" --dev "$work/other.tsv"
printf '[PAD]\n[CLS]\n[SEP]\n' >"$work/short.txt"
refused "vocabulary without [UNK]" 2 "$work/short.txt: lacks [UNK]" --train "$sentences" \
    --vocab "$work/short.txt"
: >"$work/short.txt"
refused "empty vocabulary" 2 "$work/short.txt: holds 0 pieces" --train "$sentences" \
    --vocab "$work/short.txt"

# Files that cannot be written are found out before the training.
refused "plot" 2 "$work/no/plot.svg: cannot be written: No such file or directory" \
    --train "$sentences" --plot "$work/no/plot.svg"
refused "CSV" 2 "$work/no/l.csv: cannot be written: No such file or directory" \
    --train "$sentences" --csv "$work/no/l.csv"
refused "dump" 2 "$work/no/dump: cannot be made: No such file or directory" \
    --train "$sentences" --dump-parameters "$work/no/dump"

# Real text.
if [ -n "${SEBP_TEST_DATA:-}" ]; then
    for set in sst2 cola; do
        trains "$set" --train "$SEBP_TEST_DATA/$set/train.tsv" \
            --dev "$SEBP_TEST_DATA/$set/dev.tsv" --max-length 48 \
            --vocab "$SEBP_TEST_DATA/bert-base-uncased/vocab.txt"
    done
else
    skip "SST-2: SEBP_TEST_DATA is not set"
    skip "CoLA: SEBP_TEST_DATA is not set"
fi

finish
