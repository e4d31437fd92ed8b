# An interpreter, a compiler, threads and vector code at work.
set -e
step() { echo "step: $*"; }

step perl
perl -e 'my %h; $h{$_ % 97} += $_ ** 2 for 1 .. 100000; my $s = 0; $s += $h{$_} for sort keys %h;
    print $s == 333338333350000 ? "perl: passed\n" : "perl: $s\n"' | grep 'perl: passed'
perl -e '$SIG{ALRM} = sub { print "alarm: passed\n"; exit }; alarm 1; 1 while 1' | grep 'alarm: passed'
perl -e 'my $p = fork; if (!$p) { kill SEGV => $$; exit } waitpid $p, 0; print $? & 127, "\n"' | grep -x 11

step tcc compiles itself a program and runs it
cat >/tmp/primes.c <<'C'
int printf(const char *, ...);
int main(void) {
    int count = 0;
    for (int n = 2; n < 20000; n++) {
        int prime = 1;
        for (int d = 2; d * d <= n; d++)
            if (n % d == 0) { prime = 0; break; }
        count += prime;
    }
    double root = 1;
    for (int i = 0; i < 50; i++) root = (root + 2 / root) / 2;
    printf("primes %d root %.12f\n", count, root);
    return 0;
}
C
tcc -o /tmp/primes /tmp/primes.c
/tmp/primes | grep -x 'primes 2262 root 1.414213562373'
tcc -run /tmp/primes.c | grep -x 'primes 2262 root 1.414213562373'

step threads
/doppel/threads

step vectors
/doppel/vectors
