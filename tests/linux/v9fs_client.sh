# Linux's v9fs as a client of `tinyvmm serve`: mount what it serves in each version of the protocol,
# use it, and print a line "VERSION WHAT: RESULT" for everything tried.
#
# usage: v9fs_client.sh DIRECTORY 9PNET_FD.KO COMMAND...     where COMMAND runs tinyvmm
directory=$1 module=$2
shift 2

[ -d /sys/module/9pnet_fd ] || insmod "$module" || exit
mkdir -p "$directory"/files "$directory"/one "$directory"/two
socket=$directory/socket
"$@" serve --listen "unix:$socket" --shared "$directory/files" > "$directory/server" 2>&1 &
server=$!
until [ -S "$socket" ]; do sleep 1; kill -0 $server || { cat "$directory/server"; exit 1; }; done

# Everything is done on both sides of the socket: `here` is what the host has.
here=$directory/files there=$directory/one other=$directory/two
for version in 9p2000 9p2000.u 9p2000.L; do
  say() { echo "$version $*"; }
  mount_at() {
    mount -t 9p -o "trans=unix,version=$version,cache=none,access=any,uname=root,dfltuid=0,dfltgid=0" \
      "$socket" "$1"
  }
  mount_at "$there" && say mounted: "$(stat -fc %T "$there")"
  mount_at "$other"

  echo "from the host" > "$here/file"; chmod 640 "$here/file"; touch -d @1000000000 "$here/file"
  say read: "$(cat "$there/file")"
  say stat: "$(stat -c '%s %a %Y %F' "$there/file")"
  echo "from the client" > "$there/new"; echo "and more" >> "$there/new"
  say written: "$(tr '\n' ' ' < "$here/new")"
  say other client: "$(tr '\n' ' ' < "$other/new")"
  mkdir "$there/directory" && mv "$there/new" "$there/moved"
  say listed: "$(ls "$there" | tr '\n' ' ')"
  say over there: "$(ls "$here" | tr '\n' ' ')"
  chmod 600 "$there/moved" && say chmod: "$(stat -c %a "$here/moved")"
  truncate -s 5 "$there/moved" && say truncated: "$(cat "$here/moved")"
  head -c 1048576 /dev/urandom > "$here/large"
  cp "$there/large" "$there/copy" && cmp "$here/large" "$here/copy" && say copied: yes
  head -c 100000 "$there/large" | cmp - "$other/copy" 2>&1 | grep -q 'EOF on' && say agreed: yes
  ln -s file "$here/link"
  say link: "$(readlink "$there/link" || echo none)"
  say missing: "$(cat "$there/nothing" 2>&1 | sed 's/.*: //')"
  say not empty: "$(touch "$there/directory/in"; rmdir "$there/directory" 2>&1 | sed 's/.*: //')"
  rm -r "$there/directory" "$there/moved" "$there/copy" "$there/large" "$there/link" "$there/file"
  say left: "$(ls "$here" | wc -l)"
  umount "$there" && umount "$other" && say unmounted: yes
done
kill $server
wait $server
echo "server ended: $?"
cat "$directory/server"
