#!/bin/bash
# Process 1 of a host in a container: makes the kernel's views writable, starts the engine and
# etcd, and keeps flyd running as systemd would. Works without --privileged (docs/operations.md).
# Environment: FLYD_PYTHON, ETCD_COMMAND (empty: no etcd on this host), HOST_NAME.
set -u

mount -o remount,rw /proc/sys 2>/dev/null
if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
  mount -o remount,rw /sys/fs/cgroup
  mkdir -p /sys/fs/cgroup/init && for pid in $(cat /sys/fs/cgroup/cgroup.procs); do
    echo "$pid" >/sys/fs/cgroup/init/cgroup.procs 2>/dev/null
  done
  sed -e 's/ / +/g' -e 's/^/+/' </sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
else
  mount -o remount,rw /sys/fs/cgroup 2>/dev/null
  for controller in $(ls /sys/fs/cgroup); do
    [ -d "/sys/fs/cgroup/$controller" ] && [ ! -L "/sys/fs/cgroup/$controller" ] || continue
    umount "/sys/fs/cgroup/$controller" 2>/dev/null
    case $controller in
      systemd) mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd ;;
      unified) ;;
      *) mount -t cgroup -o "${controller}" cgroup "/sys/fs/cgroup/$controller" ;;
    esac
  done 2>/dev/null
fi

mkdir -p /var/log/flyd
# What a power cut left in /run, which a machine's boot would empty.
rm -rf /run/docker* /run/containerd /run/wireguard
(while :; do
  dockerd --cgroup-parent "/docker-$HOST_NAME" --log-level warn --iptables=true >>/var/log/flyd/dockerd.log 2>&1
  sleep 1
done) &
if [ -n "${ETCD_COMMAND:-}" ]; then
  (while :; do $ETCD_COMMAND >>/var/log/flyd/etcd.log 2>&1; sleep 1; done) &
fi
for _ in $(seq 100); do docker info >/dev/null 2>&1 && break; sleep 0.1; done

trap 'kill $(jobs -p) 2>/dev/null; exit 0' TERM INT
while :; do
  "$FLYD_PYTHON" -m flyd.daemon --config /etc/flyd.toml >>/var/log/flyd/flyd.log 2>&1 &
  wait $!
  sleep 0.5
done
