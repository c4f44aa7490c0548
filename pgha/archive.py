"""The archive's two commands, run by Postgres itself: a segment goes in, a segment comes out (I12).

Going in: copied beside, made durable, then named by a link, which never replaces anything. So however many
members archive the same segment (all do: archive_mode is `always`, so what a primary had not archived when
it died its replicas have), and whenever one of them dies, a name has one content for ever. The same content
again is fine; another is refused, Postgres logs it, keeps the segment and tries again.

One segment of each timeline that has ended differs between members and is right on all of them: that in
which the next timeline began. Members have the same bytes up to the fork and leftovers behind it, and each
archives it as a whole segment. There only the bytes before the fork are compared (wal_history.py hides the
rest from every restore). Placeholders of timelines that never were (wal.py) do not go in.

Nothing goes in unless the archive's `owner` file is this cluster's (archive_owner.py).

Plain shell (coreutils, diffutils): Postgres' user may not be allowed to run our Python. Pure.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from pgha.wal import PLACEHOLDER

OWNER = "owner"  # beside wal/ and base/

PUSH = """\
# Written by pgha at each change: do not edit. Postgres runs it: archive.sh PATH NAME
path=$1 name=$2 wal={wal}
there=$wal/$name partial=$wal/.$name.{node}.$$

refuse() {{ echo "pgha: $name is not archived: $1" >&2; exit 1; }}

cmp -s {owned} {owner} || refuse "{owner_hint}"
case $name in
*.history) read -r first < "$path"; [ "$first" = {placeholder} ] && exit 0 ;;
esac
trap 'rm -f "$partial"' EXIT
if ! [ -e "$there" ]; then
    cp "$path" "$partial" && sync "$partial" || refuse "$wal cannot be written"
    ln "$partial" "$there" 2> /dev/null  # who comes second compares
    sync "$wal" || refuse "$wal cannot be synced"
fi
cmp -s "$path" "$there" && exit 0
[ -e "$there" ] || refuse "$there cannot be made"

whole=${{name%.partial}}
[ ${{#whole}} = 24 ] || refuse "$there has another content"
timeline=$((0x${{whole%????????????????}}))
for history in "$wal"/*.history; do
    while read -r parent fork _; do
        [ "$parent" = "$timeline" ] || continue
        low=$((0x${{fork#*/}}))
        at=$(printf '%08X%08X' $((0x${{fork%/*}})) $((low / {segment})))
        [ "$at" = "${{whole#????????}}" ] && cmp -s -n $((low % {segment})) "$path" "$there" && exit 0
    done < "$history"
done
refuse "$there has another content. Do two clusters archive there? The one that is there stays"
"""


def push_script(wal_dir: Path, node: str, owned: Path, segment_bytes: int) -> str:
    """What archive_command runs: it succeeds once the segment is durable under its name.

    `owned` is this member's copy of the archive's owner file, absent until it is known to be ours.
    """
    return PUSH.format(
        wal=shlex.quote(str(wal_dir)),
        node=shlex.quote(node),
        owned=shlex.quote(str(owned)),
        owner=shlex.quote(str(wal_dir.parent / OWNER)),
        owner_hint="the archive is not known to be this cluster's. If it is another's, give this cluster "
        "an archive of its own",
        placeholder=shlex.quote(PLACEHOLDER.strip()),
        segment=segment_bytes,
    )


def push_command(script: Path) -> str:
    """For archive_command."""
    return f"sh {shlex.quote(str(script).replace('%', '%%'))} %p %f"


def fetch_command(wal_dir: Path) -> str:
    """For restore_command: fails for what is not there; that is how Postgres finds the end."""
    there = shlex.quote(str(wal_dir).replace("%", "%%") + "/") + "%f"
    return f"[ -e {there} ] && cp {there} %p"
