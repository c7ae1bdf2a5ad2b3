# An SFTP server behind a counter of the requests that change something, for tests.
# usage: perl relay.pl STATE PROGRAM [ssh's arguments ... -- host sftp | "sh -s"]
# STATE/count counts over all channels; STATE/strike says "NTH kill" or "NTH cut": the NTH request is
# not passed on, and then the program that started this is killed, or the line is closed.
use strict; use warnings; use Fcntl qw(:flock); use IO::Handle;
my ($state, $program) = @ARGV;
exec "sh", "-s" if $ARGV[-1] eq "sh -s";
my $parent = getppid;
pipe(my $to_r, my $to_w) or die; pipe(my $from_r, my $from_w) or die;
my $server = fork; defined $server or die;
if (!$server) {
  open(STDIN, "<&", $to_r); open(STDOUT, ">&", $from_w);
  close $_ for $to_r, $to_w, $from_r, $from_w;
  exec $program; die;
}
close $to_r; close $from_w;
open(my $strike_file, "<", "$state/strike") or die; my ($nth, $how) = split " ", <$strike_file>;
# WRITE, FSETSTAT, REMOVE, RENAME; OPEN for writing; EXTENDED fsync and posix-rename.
sub changes {
  my $packet = shift; my $type = ord $packet;
  return 1 if $type == 6 || $type == 10 || $type == 13 || $type == 18;
  if ($type == 3) { my $len = unpack "N", substr $packet, 5, 4; return (unpack("N", substr $packet, 9 + $len, 4) & 8) != 0; }
  return $type == 200 && $packet =~ /^.{5}....(fsync|posix-rename)\@/s;
}
sub strikes {
  open(my $count, "+<", "$state/count") or die; flock $count, LOCK_EX; my $now = <$count> + 1;
  seek $count, 0, 0; print $count "$now\n"; $count->flush; close $count; return $now == $nth;
}
sub put { my ($to, $bytes) = @_; while (length $bytes) { my $n = syswrite $to, $bytes; defined $n or exit 1; substr($bytes, 0, $n) = ""; } }
my $held = "";
while (1) {
  my $wait = ""; vec($wait, $_, 1) = 1 for 0, fileno $from_r;
  select(my $ready = $wait, undef, undef, undef) > 0 or next;
  if (vec $ready, fileno $from_r, 1) { my $n = sysread $from_r, my $bytes, 1 << 18; $n or exit 0; put(\*STDOUT, $bytes); }
  if (vec $ready, 0, 1) {
    my $n = sysread STDIN, $held, 1 << 18, length $held; $n or exit 0;
    while (length $held >= 4) {
      my $len = unpack "N", $held; last if length $held < 4 + $len;
      my $packet = substr $held, 4, $len;
      if (changes($packet) && strikes()) { kill "KILL", $parent if $how eq "kill"; exit 0; }
      put($to_w, substr $held, 0, 4 + $len); substr($held, 0, 4 + $len) = "";
    }
  }
}
