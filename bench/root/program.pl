# Strings, regular expressions, hashes, arrays, sorting, calls: what a Perl program is made of.
use strict;
use warnings;

my $seed = 1;
sub number { $seed = ($seed * 1103515245 + 12345) % 2147483648; return ($seed >> 8) % $_[0] }

my (%count, @lines);
for my $n (1 .. 4000) {
    my $line = join ' ', map { chr(97 + number(26)) . chr(97 + number(5)) . number(50) } 1 .. 6;
    push @lines, $line;
    $count{$_}++ for split / /, $line;
}
my @often = sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count;
print "$_ $count{$_}\n" for @often[0 .. 9];

my $digits = 0;
for (@lines) {
    $digits += $1 while /[aeiou](\d+)/g;
    s/(\w)(\w)(\d*)/$2$1$3/g;
}
print "$digits ", length(join "\n", @lines), "\n";

my @primes = (2);
N: for (my $n = 3; @primes < 1500; $n += 2) {
    for my $p (@primes) { last if $p * $p > $n; next N if $n % $p == 0 }
    push @primes, $n;
}
print "$primes[-1]\n";

sub hanoi { my ($n, $from, $to, $by) = @_; return $n ? hanoi($n - 1, $from, $by, $to) + 1 + hanoi($n - 1, $by, $to, $from) : 0 }
print hanoi(12, 'a', 'b', 'c'), "\n";
