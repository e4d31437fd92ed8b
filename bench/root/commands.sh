# A shell script of a few hundred commands: those that build scripts and start-up scripts are made of.
set -e
dir=/tmp/bench-shell
mkdir -p $dir/src $dir/out
n=0
while [ $n -lt 25 ]; do
    n=$((n + 1))
    name=$dir/src/file$n
    echo "file $n: the quick brown fox jumps over the lazy dog" >$name.txt
    printf '%s\n' alpha beta gamma delta $n >>$name.txt
    sed -e 's/quick/slow/' -e "s/beta/beta$n/" $name.txt >$dir/out/file$n.out
    words=$(wc -w <$dir/out/file$n.out)
    lines=$(grep -c a $dir/out/file$n.out)
    sum=$(cat $name.txt $dir/out/file$n.out | sort | uniq | cksum | cut -d ' ' -f 1)
    case $((n % 3)) in
    0) mv $dir/out/file$n.out $dir/out/moved$n ;;
    1) cp $dir/out/file$n.out $dir/out/copy$n ;;
    *) ln -s file$n.out $dir/out/link$n ;;
    esac
    echo "$n $words $lines $sum $(basename $name.txt .txt) $(expr $n \* $n)"
done
find $dir -type f | sort | xargs cat | tr a-z A-Z | awk '{ n += NF } END { print NR, n }'
ls $dir/out | head -n 20 | tail -n 3
rm -r $dir
