#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Tests of programs/peft_shootout on a tiny model: that methods which must agree do, that equal
# numbers of elements train and memory is what it should be, and that bad input is refused in one
# line. Nothing here depends on time.
#
# Run in the build directory.
# shellcheck disable=SC2016 # the awk programs and the commands for sh -c expand nothing here
set -u

# shellcheck source=tests/checks.sh
. "$(dirname "$0")/checks.sh"

builddir=${top_builddir:-.}
srcdir=${top_srcdir:-$builddir}
program=$builddir/programs/peft_shootout
gadgets=$srcdir/programs/data/gadgets.tsv

# runs NAME ARGUMENTS...: a small run; leaves runs.csv, losses.csv, plot.svg, table and messages.
runs() {
    name=$1
    shift
    rm -f "$work/runs.csv" "$work/losses.csv" "$work/plot.svg"
    if "$program" --layers 1 --hidden 20 --heads 2 --max-length 24 --batch 4 --threads 2 \
        --basis-rank 20 --basis-steps 4 --basis-rate 1 --fix-support-after 3 --steps 12 --pretrain-steps 20 \
        --dev "$work/dev.tsv" --train "$work/train.tsv" --pretrain "$work/pretrain.tsv" \
        --rates 3e-3 --seeds 1 --csv "$work/runs.csv" --losses "$work/losses.csv" \
        --plot "$work/plot.svg" "$@" >"$work/table" 2>"$work/messages"; then
        pass
    else
        fail "$name"
        sed 's/^/    /' "$work/messages"
    fi
}

# follows NAME METHOD STEPS TOLERANCE: in losses.csv the method's losses are those of full, up to a
# relative tolerance, in the first STEPS steps of 12; afterwards they are not.
follows() {
    check "$1" awk -F, -v method="$2" -v steps="$3" -v tolerance="$4" '
        $1 == "full" { full[$3] = $4 }
        $1 == method { other[$3] = $4 }
        END {
            for (i = 1; i <= 12; i++) {
                apart = full[i] - other[i]
                apart = apart < 0 ? -apart : apart
                if (!(i in full) || !(i in other)) { bad = 1 }
                if (i <= steps && !(apart <= tolerance * full[i])) { print i, apart; bad = 1 }
                if (i > steps && apart > tolerance * full[i]) { differs++ }
                moves += i > 1 && full[i] != full[i - 1]
            }
            exit bad || moves < 11 || (steps < 12 && !differs)
        }' "$work/losses.csv"
}

# refused NAME STATUS MESSAGE ARGUMENTS...: exits with the status and that one line, writes nothing.
refused() {
    name=$1 status=$2 message=$3
    shift 3
    mkdir "$work/empty"
    (cd "$work/empty" && "$program" "$@" >../out 2>../log)
    found=$?
    written=$(ls "$work/empty")
    rm -rf "$work/empty"
    printf 'peft_shootout: %s\n' "$message" >"$work/expected"
    if [ "$found" -eq "$status" ] && [ -z "$written" ] && [ ! -s "$work/out" ] &&
        cmp -s "$work/expected" "$work/log"; then
        pass
    else
        fail "$name: exit status $found, files '$written', message:"
        sed 's/^/    /' "$work/log"
    fi
}

case $builddir in
/*) ;;
*) program=$PWD/$program ;;
esac
if [ ! -x "$program" ]; then
    echo "no $program"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi

sed -n 1,200p "$gadgets" >"$work/train.tsv"
sed -n 201,300p "$gadgets" >"$work/dev.tsv"
sed -n 1,200p "$srcdir/programs/data/films_and_meals.tsv" >"$work/pretrain.tsv"

check "--help" "$program" --help

# All methods: the files are whole, elements and bytes are what they should be.
runs "all methods" --seeds 2 --rates 1e-3,3e-3
cp "$work/losses.csv" "$work/first.csv"
if grep -q 'SparseGrad is left out' "$work/messages"; then
    skip "SparseGrad: the library has no LAPACK"
    check "the message says what to install" grep -q 'LAPACK; install' "$work/messages"
    sparse='' methods=6
else
    sparse=yes methods=9
fi
# Two weights of 20 x 80; k = 2 (20 + 80) of each. A state of 16 bytes an element has a head.
check "runs.csv" awk -F, -v methods="$methods" '
    NR == 1 { bad = NF != 15 || $1 != "method" || $15 != "shared_bytes" }
    NR == 2 { bad = bad || NF != 15 || $1 != "before" }
    NR > 2 {
        fixed = $1 == "mask" || $1 == "sparsegrad-leading-fixed"
        k = $1 == "frozen" || $1 == "full-then-frozen" ? 0 : $1 == "full" ? 3200 : 400
        least = fixed ? 20 * k : k == 0 || $1 == "full" || $1 == "lora" ? 12 * k : 28 * k
        most = fixed ? 20 * k + 256 : \
            $1 == "meprop" || $1 ~ /^sparsegrad/ ? 12 * k + 43 * 3200 : least
        bytes = $13 + $14
        if (NF != 15 || $4 != k || bytes < least || bytes > most || !($7 > 0.1 && $7 < 5) ||
            !($5 >= 0 && $5 <= 1) || !($6 >= -1 && $6 <= 1) || !($8 > 0) || !($9 > $8) ||
            !($11 >= $12) || !($12 > 1e6) || ($3 != 0.001 && $3 != 0.003)) { print; bad = 1 }
        if ($1 ~ /^sparsegrad/ ? $15 < 4000 : $15 != 0) { print; bad = 1 }
        seeds[$2]++
    }
    END { exit bad || seeds[1] != methods || seeds[2] != methods || NR != 2 + 2 * methods }' \
    "$work/runs.csv"
check "losses.csv" awk -F, -v methods="$methods" '
    NR > 1 && !($4 > 0.01 && $4 < 20) { print; bad = 1 }
    END { exit bad || NR != 1 + 2 * 12 * methods }' "$work/losses.csv"
if command -v xmllint >/dev/null; then
    check "the plot is XML" xmllint --noout "$work/plot.svg"
else
    check "the plot ends" grep -q '^</svg>$' "$work/plot.svg"
fi
check "the plot has its curves" test "$(grep -c '<polyline' "$work/plot.svg")" -eq "$methods"
check "the plot has its dots" test "$(grep -c '<circle' "$work/plot.svg")" -eq $((2 * methods))
check "the table has its rows" test "$(grep -c '±' "$work/table")" -eq "$methods"
runs "the same again" --seeds 2 --rates 1e-3,3e-3
check "the same seeds give the same losses" cmp "$work/losses.csv" "$work/first.csv"
check "another seed gives other losses" awk -F, '
    $2 == 1 { first[$1, $3] = $4 }
    $2 == 2 && first[$1, $3] == $4 { print; same++ }
    END { exit NR < 2 || same > 0 }' "$work/losses.csv"

# With every element kept, 16 (20 + 80) = 20 x 80, MeProp is full fine-tuning.
runs "MeProp, all elements" --methods full,meprop --lora-rank 16
follows "MeProp with all elements is full" meprop 12 1e-5
runs "MeProp, few elements" --methods full,meprop --lora-rank 1
follows "MeProp with few elements is not" meprop 1 1e-6

# So is a mask of all of them.
runs "a mask of all elements" --methods full,mask --lora-rank 16
follows "a mask of all elements is full" mask 12 1e-5
runs "a mask of few elements" --methods full,mask --lora-rank 1
follows "a mask of few elements is not" mask 1 1e-6

# The steps in which all elements train, and what their rate is.
runs "full, then frozen" --methods frozen,full,full-then-frozen
follows "at first full-then-frozen is full" full-then-frozen 5 0
runs "full, then frozen, at a rate of its own" --methods full,full-then-frozen --basis-rate 0.5
follows "at another rate it is not" full-then-frozen 1 0
runs "full in all steps" --methods full,full-then-frozen --basis-steps 12
follows "without later steps it is full" full-then-frozen 12 0

# The differences are those of the same seeds: of two, the larger is the mean and 12.71 errors.
runs "differences" --methods full,lora,mask --seeds 2
check "differences, with intervals" awk -F, '
    NR == FNR { if (NR > 2) { right[$1, $2] = 100 * $5 } next }
    FNR == 1 { FS = "[ (),]+"; next }
    /^(lora|mask) +accuracy/ {
        one = right[$1, 1] - right["full", 1]
        two = right[$1, 2] - right["full", 2]
        apart = one - two
        half = 12.7062 * (apart < 0 ? -apart : apart) / 2
        mean = (one + two) / 2
        if ((mean - $3) ^ 2 > 0.003 || (mean - half - $4) ^ 2 > 0.003 ||
            (mean + half - $6) ^ 2 > 0.003) { print; bad = 1 }
        seen++
    }
    END { exit bad || seen != 2 }' "$work/runs.csv" "$work/table"

# SparseGrad trains in full until it has its bases.
if [ -n "$sparse" ]; then
    runs "SparseGrad" --methods full,sparsegrad,sparsegrad-leading
    follows "SparseGrad's basis phase" sparsegrad 5 0
    follows "SparseGrad's basis phase, leading vectors" sparsegrad-leading 5 0
    runs "the basis phase alone" --methods full,sparsegrad --basis-steps 12
    follows "the basis phase is full" sparsegrad 12 0
    runs "SparseGrad, all elements" --methods sparsegrad --lora-rank 16
    cp "$work/losses.csv" "$work/first.csv"
    runs "SparseGrad, few elements" --methods sparsegrad --lora-rank 1
    check "how many elements matters once there are bases" awk -F, '
        NR == FNR { all[$3] = $4 }
        NR != FNR && $3 <= 5 && all[$3] != $4 { print; bad = 1 }
        NR != FNR && $3 > 5 { differs += all[$3] != $4 }
        END { exit bad || differs < 5 }' "$work/first.csv" "$work/losses.csv"
    runs "a fixed support" --methods sparsegrad-leading,sparsegrad-leading-fixed
    check "until the support is fixed nothing differs" awk -F, '
        $1 == "sparsegrad-leading" { leading[$3] = $4 }
        $1 == "sparsegrad-leading-fixed" { fixed[$3] = $4 }
        END {
            for (i = 1; i <= 8; i++) { bad = bad || leading[i] != fixed[i] }
            for (i = 9; i <= 12; i++) { differs += leading[i] != fixed[i] }
            exit bad || !differs
        }' "$work/losses.csv"
fi

# Merging changes nothing, but what LoRA trained does.
runs "LoRA" --methods frozen,lora --rates 1e-2
cp "$work/runs.csv" "$work/merged.csv"
runs "LoRA, unmerged" --methods frozen,lora --rates 1e-2 --unmerged
check "merged LoRA is LoRA" awk -F, '
    { method = $1 }
    NR == FNR { loss[method] = $7; right[method] = $5 }
    NR != FNR && method == "lora" {
        apart = loss[method] - $7
        apart = apart < 0 ? -apart : apart
        moved = loss["lora"] - loss["frozen"]
        moved = moved < 0 ? -moved : moved
        print apart, moved
        bad = apart > 1e-5 * $7 || right[method] != $5 || moved < 20 * apart || moved == 0
        seen = 1
    }
    END { exit bad || !seen }' "$work/merged.csv" "$work/runs.csv"

# Feed-forward layers wider and narrower than usual: of 2 x 20 F elements 2 x 2 (20 + F) train.
for width in 30 12; do
    runs "feed-forward width $width" --feed-forward "$width" --rates 1e-3
    check "width $width: elements" awk -F, -v F="$width" -v methods="$methods" '
        $1 ~ /^(lora|mask|meprop|sparsegrad)/ { bad = bad || $4 != 4 * (20 + F) }
        $1 == "full" { bad = bad || $4 != 40 * F }
        END { exit bad || NR != 2 + methods }' "$work/runs.csv"
done

# Data: other classes than in pretraining, no pretraining, no dev data.
for i in 1 2 3 4; do
    printf 'fine\t0\nbad thing %d\t1\nthe lamp is odd\t2\n' "$i"
done >"$work/three.tsv"
runs "three classes" --train "$work/three.tsv" --dev "$work/three.tsv" --methods lora
check "three classes: the loss" awk -F, '$1 == "lora" && $4 > 0.9 { many++ } END { exit many < 6 }' \
    "$work/losses.csv"
runs "no pretraining" --pretrain none --methods frozen,lora --rest all --metric matthews

# What is done is kept where the program is ended: of 100 seeds' runs some, whole, in order. A run's
# losses are written before its line.
rm -f "$work/runs.csv" "$work/losses.csv"
"$program" --layers 1 --hidden 20 --heads 2 --max-length 24 --batch 4 --threads 1 --steps 12 \
    --train "$work/train.tsv" --pretrain none --rates 3e-3 --seeds 100 --methods frozen,full \
    --csv "$work/runs.csv" --losses "$work/losses.csv" --plot "$work/none.svg" \
    >"$work/table" 2>"$work/messages" &
experiment=$!
tries=0
while [ "$(wc -l 2>/dev/null <"$work/runs.csv" || echo 0)" -lt 5 ] && [ "$tries" -lt 300 ] &&
    kill -0 "$experiment" 2>/dev/null; do
    sleep 0.2
    tries=$((tries + 1))
done
kill -TERM "$experiment" 2>/dev/null
wait "$experiment" 2>/dev/null
ended=$?
check "the experiment was interrupted" test "$ended" -gt 128
check "finished runs are kept" awk -F, '
    NR == 2 { bad = $1 != "before" }
    NR > 2 && $1 != (NR % 2 ? "frozen" : "full") { print; bad = 1 }
    NF != 15 || NR > 2 && ($2 != int((NR - 1) / 2) || !($8 > 0)) { print; bad = 1 }
    END { exit bad || NR < 5 || NR > 201 }' "$work/runs.csv"
check "and their losses" awk -F, '
    NR == FNR { runs += FNR > 2; next }
    FNR > 1 && NF == 4 && $4 > 0 { steps[$1, $2]++ }
    END {
        for (run in steps) { whole += steps[run] == 12 }
        exit !runs || whole < runs || whole > runs + 1
    }' "$work/runs.csv" "$work/losses.csv"

# A gradient or loss that is not finite.
if "$program" --layers 1 --hidden 20 --heads 2 --steps 8 --pretrain none --train "$gadgets" \
    --rates 1e30 --seeds 1 --methods full --plot "$work/none.svg" >"$work/table" \
    2>"$work/messages"; then
    fail "a rate of 1e30: no failure"
else
    check "a rate of 1e30" grep -q -E '^peft_shootout: the loss of step [1-8] is not finite$' \
        "$work/messages"
    check "and whose it was" grep -q '^peft_shootout: that was full with seed 1 and rate 1e+30$' \
        "$work/messages"
fi

# The same in the last step, whose loss is that of before it; and where nobody waits for children.
if "$program" --layers 1 --hidden 20 --heads 2 --steps 1 --pretrain none --train "$gadgets" \
    --rates 1e30 --seeds 1 --methods full --plot "$work/none.svg" >"$work/table" \
    2>"$work/messages"; then
    fail "one step of 1e30: no failure"
else
    check "one step of 1e30" \
        grep -q '^peft_shootout: the loss of the judged data is not finite$' "$work/messages"
fi
check "a rate of 1e30 is not chosen" "$program" --layers 1 --hidden 20 --heads 2 --steps 1 \
    --pretrain none --train "$gadgets" --rates 1e30,1e-9 --seeds 1 --methods full \
    --plot "$work/none.svg"
if (trap '' CHLD && "$program" --layers 1 --hidden 20 --heads 2 --steps 8 --pretrain none \
    --train "$gadgets" --rates 1e30 --seeds 1 --methods full --plot "$work/none.svg") \
    >"$work/table" 2>"$work/messages"; then
    fail "with SIGCHLD ignored: no failure"
else
    pass
fi

# Bad options.
refused "unknown option" 2 "unknown option '--rank' (--help lists them)" --rank 8
refused "method" 2 "--methods: there is no method 'sparse' (--help lists them)" --methods lora,sparse
refused "no method" 2 "--methods: there is no method '' (--help lists them)" --methods lora,
refused "rates" 2 "--rates: 'x' is not a number" --rates 1e-3,x
refused "a rate of NaN" 2 "--rates: nan is not in [1e-09, 1e+30]" --rates nan
refused "heads" 2 "--heads: 5 do not divide --hidden 64" --hidden 64 --heads 5
refused "metric" 2 "--metric: 'f1' is not accuracy or matthews" --metric f1
refused "rest" 2 "--rest: 'none' is not all or head" --rest none
refused "rank" 2 "--lora-rank: 17 means 1700 elements of weights that have 1600" --hidden 20 \
    --heads 2 --lora-rank 17
refused "leading vectors" 2 \
    "--basis-rank: 10 vectors leave 100 elements, but --lora-rank 1 means 320 of them" \
    --hidden 64 --basis-rank 10 --lora-rank 1
refused "basis steps" 2 "--basis-steps: 3 steps of 1 layers are too few for 512 vectors" \
    --layers 1 --basis-steps 3
refused "basis steps for leading vectors" 2 \
    "--basis-steps: 1 steps of 1 layers are too few for 80 vectors" --layers 1 --hidden 20 \
    --heads 2 --methods sparsegrad-leading --basis-steps 1 --basis-rank 80 --lora-rank 1
refused "one file twice" 2 "same: is to be two files at once" --csv same --plot same
refused "no pretraining data" 2 \
    "--train: needs --pretrain too: a file, or none for random parameters to begin with" \
    --train "$gadgets"

# Bad data, and files that cannot be written.
refused "no such file" 2 "$work/no.tsv: No such file or directory" --train "$work/no.tsv" \
    --pretrain none
refused "no such pretraining file" 2 "$work/no.tsv: No such file or directory" \
    --pretrain "$work/no.tsv"
printf 'a\t0\nb\t1\n' >"$work/bad.tsv"
refused "too few" 2 "$work/bad.tsv: 2 sentences are too few to be split" --train "$work/bad.tsv" \
    --pretrain none
printf 'a\t0\nb\t2\n' >"$work/other.tsv"
refused "a label training lacks" 2 \
    "$work/other.tsv:2: label 2, but the training data has only 0 to 1" --dev "$work/other.tsv"
printf 'a\t0\nb\t0\n' >"$work/bad.tsv"
refused "one class" 2 "$work/bad.tsv: every label is 0: nothing to learn" --pretrain "$work/bad.tsv"
for flag in plot csv losses; do
    refused "$flag" 2 "$work/no/x: cannot be written: No such file or directory" \
        --$flag "$work/no/x"
done

finish
