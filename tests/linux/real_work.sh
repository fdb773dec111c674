# Programs that people run, on the file system that they are given: prints "ok NAME SECONDS" or
# "FAIL NAME: ITS LAST WORDS" for each.
#
# usage: real_work.sh DIRECTORY PYTHON SHARED
# DIRECTORY holds *.deb and a wheel, PYTHON has pip, SHARED is a directory live on both sides.
inputs=$1 python=$2 shared=$3
work=/root/work
mkdir -p $work && cd $work || exit

try() {
  name=$1
  shift
  begin=$(date +%s)
  if out=$(timeout 600 sh -ec "$*" 2>&1); then
    echo "ok $name $(($(date +%s) - begin))"
  else
    echo "FAIL $name: $(printf %s "$out" | tail -n 4 | tr '\n' '|')"
  fi
}

on_both() { # NAME COMMAND: in the private root, and in the shared directory
  try "$1" "$2"
  cd "$shared" && try "$1, shared" "$2"
  cd $work || exit
}

# Without triggers, or dpkg has man-db read every page of the manual there is.
try "dpkg -i" "dpkg --no-triggers -i $inputs/*.deb; hello | grep -q 'Hello, world'
  echo 2^64 | bc | grep 18446744073709551616; dpkg -V hello bc"
try "dpkg -r" "dpkg --no-triggers -r hello; ! test -e /usr/bin/hello; dpkg -V bc"

cat > rollback.sql <<'SQL'
PRAGMA journal_mode = DELETE;
CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000)
INSERT INTO t SELECT i, hex(randomblob(20)) FROM n;
BEGIN; DELETE FROM t WHERE a % 2; ROLLBACK;
BEGIN; DELETE FROM t WHERE a % 5 = 0; COMMIT;
VACUUM;
SELECT count(*) FROM t;
PRAGMA integrity_check;
SQL
sed s/DELETE\;/WAL\;/ rollback.sql > wal.sql
for mode in rollback wal; do
  on_both "sqlite $mode" "rm -f $mode.db*; sqlite3 $mode.db < $work/$mode.sql | tail -n 2 | tr '\n' ' ' | grep -q '1600 ok'"
done
# Two writers at once: locks, and what each sees of the other's pages.
on_both "sqlite writers" "
  rm -f two.db*; sqlite3 two.db 'PRAGMA journal_mode=WAL; CREATE TABLE t (a)' > /dev/null
  add() { for i in 1 2 3 4 5; do echo '.timeout 60000
INSERT INTO t VALUES (1);'; done | sqlite3 two.db; }
  add & add; wait
  sqlite3 two.db 'SELECT count(*) FROM t; PRAGMA integrity_check' | tr '\n' ' ' | grep -q '10 ok'"

try "venv and pip install" "
  $python -m venv --without-pip env
  $python -m pip --python env/bin/python install --quiet --no-index --no-compile --disable-pip-version-check $inputs/*.whl
  env/bin/tinyvmm-test-hello | grep -q 'hello from a wheel'"

fio="fio --name=f --size=1M --bs=4k --verify=crc32c --verify_fatal=1 --randseed=1 --minimal"
on_both "fio random writes" "$fio --rw=randwrite --ioengine=psync --fsync=64; rm f.*"
on_both "fio mmap" "$fio --rw=write --ioengine=mmap; rm f.*"

try "dbench" "dbench -t 8 -D $work 2 | tee dbench.out; grep -q ^Throughput dbench.out; ! grep -q ERROR dbench.out"

# Of stress-ng's file system class: those with --verify that are done soon, a few rounds each.
stressors="access chmod dir fcntl flock getdent hdd rename utime"
for stressor in $stressors; do
  try "stress-ng $stressor" "stress-ng --temp-path $work --verify --timeout 20 --quiet \
    --$stressor 1 --$stressor-ops 10"
done
