#!/usr/bin/env bash
# A real Slurm on this one machine, for the tests: four virtual nodes n1-n4, two faked GPUs each, loopback only.
#
#   cluster.sh up                  bring it up (root); does nothing to what is up already
#   cluster.sh down                stop everything it started, remove all it wrote, its lines in /etc/hosts included
#   cluster.sh start NODE          start a node again that was "powered off"
#   cluster.sh user-signal on|off  whether preemption sends the job's own --signal first (off: TERM)
#   cluster.sh config              print the path of slurm.conf, for SLURM_CONF
#
# State lies in $ALEXNET_SLURM (default: alexnet-slurm in the folder for temporary files). Nothing in /etc/slurm is
# read or written, no system service is touched. Missing Debian packages are installed only with ALEXNET_TEST_SLURM=1.
set -euo pipefail

HOME_DIR=${ALEXNET_SLURM:-${TMPDIR:-/tmp}/alexnet-slurm}
NODES=(n1 n2 n3 n4)
PORT=7817  # the controller's; the nodes' follow. Below 10000: the ranks of a job meet above
MARK="# alexnet-ddp test cluster"
PACKAGES=(slurmctld slurmd slurm-client munge)
export SLURM_CONF=$HOME_DIR/etc/slurm.conf

die() { echo "cluster.sh: $*" >&2; exit 1; }

# --- what is there ----------------------------------------------------------------------------------------------

running() { # PIDFILE NAME: is it ours and alive? A zombie is gone: not every PID 1 reaps at once
    local pid stat
    pid=$(cat "$1" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] || return 1
    stat=$(cat "/proc/$pid/stat" 2>/dev/null) || return 1
    stat=${stat##*) }
    [ "${stat:0:1}" != Z ]
}

install_packages() {
    local missing=() package policy=/usr/sbin/policy-rc.d
    for package in "${PACKAGES[@]}"; do
        dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q ^ii || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "${ALEXNET_TEST_SLURM:-}" = 1 ] ||
        die "needs the packages ${missing[*]}; ALEXNET_TEST_SLURM=1 allows it to install them (make test-slurm does)"
    command -v apt-get >/dev/null || die "needs ${missing[*]} of Slurm 22.05 or newer; only Debian's apt-get is known here"
    echo "cluster.sh: installing ${missing[*]}"
    if [ ! -e $policy ]; then # keeps the packages from starting their daemons
        trap "rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# --- what is written --------------------------------------------------------------------------------------------

write_names() { # the nodes' names, and this host's where it is unknown, mean this machine
    local name
    for name in "${NODES[@]}" "$(hostname -s)"; do
        getent hosts "$name" >/dev/null || echo "127.0.0.1 $name $MARK" >>/etc/hosts
    done
}

write_config() {
    local host tracking=proctrack/linuxproc node number gpu
    host=$(hostname -s)
    # The v1 freezer kills orphans and signals only the tasks themselves, as most sites do; else by parentage.
    grep -qE '^cgroup /sys/fs/cgroup/freezer cgroup rw' /proc/mounts && tracking=proctrack/cgroup
    for gpu in 0 1; do # character devices that behave like /dev/null
        [ -e "$HOME_DIR/etc/gpu$gpu" ] || mknod -m 666 "$HOME_DIR/etc/gpu$gpu" c 1 3
    done
    cat >"$SLURM_CONF" <<CONF
ClusterName=alexnet
# No two of these clusters count the same jobs: what one leaves is never taken for another's.
FirstJobId=$((1000 + RANDOM))
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Five seconds is the least that it takes; a requeued job starts only when its old credentials have expired.
AuthInfo=socket=$HOME_DIR/munge/run/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$HOME_DIR/state
SlurmdSpoolDir=$HOME_DIR/spool/%n
SlurmctldPidFile=$HOME_DIR/run/slurmctld.pid
SlurmdPidFile=$HOME_DIR/run/%n.pid
SlurmctldLogFile=$HOME_DIR/log/slurmctld.log
SlurmdLogFile=$HOME_DIR/log/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=$tracking
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
GresTypes=gpu
# Eight processors a node, whatever this machine has; no memory is accounted, so that jobs needn't ask for it.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,sched_min_interval=200000,bf_interval=3,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# Short timers (seconds).
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
UnkillableStepTimeout=20
MinJobAge=3600
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
CompleteWait=0
ReturnToService=2
CONF
    number=$PORT
    for node in "${NODES[@]}"; do
        number=$((number + 1))
        # Where a node can't have a host name of its own, Slurm is told that they share this host's.
        echo "NodeName=$node $(own_names || echo "NodeHostname=$host") NodeAddr=127.0.0.1 Port=$number" \
            "CPUs=8 RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
    done >>"$SLURM_CONF"
    cat >>"$SLURM_CONF" <<CONF
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=20 MaxTime=1-0 State=UP
PartitionName=high Nodes=ALL Default=NO  PriorityTier=10 PreemptMode=OFF MaxTime=1-0 State=UP
CONF
    echo "NodeName=n[1-4] Name=gpu File=$HOME_DIR/etc/gpu[0-1]" >"$HOME_DIR/etc/gres.conf"
    printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no ConstrainCores=no ConstrainRAMSpace=no ConstrainDevices=no \
        >"$HOME_DIR/etc/cgroup.conf"
}

# --- starting and stopping --------------------------------------------------------------------------------------

own_names() { unshare --uts true 2>/dev/null; } # may we give a process another host name?

start_munge() { # our own key and socket: who may talk to this cluster
    local place=$HOME_DIR/munge
    running "$place/run/pid" munged && return
    install -d -o munge -g munge -m 711 "$place"
    install -d -o munge -g munge -m 755 "$place/run"
    [ -s "$place/key" ] || (umask 077; head -c 1024 /dev/urandom >"$place/key"; chown munge:munge "$place/key")
    rm -f "$place"/run/socket*
    setpriv --reuid munge --regid munge --clear-groups munged --force --key-file="$place/key" \
        --socket="$place/run/socket" --pid-file="$place/run/pid" --log-file="$place/run/log" --seed-file="$place/run/seed"
}

start_node() {
    running "$HOME_DIR/run/$1.pid" slurmd && return
    mkdir -p "$HOME_DIR/spool/$1"
    if own_names; then unshare --uts bash -c "hostname $1 && exec slurmd -N $1" </dev/null
    else setsid slurmd -N "$1" </dev/null; fi
}

all_idle() { [ "$(sinfo -h -p low -N -o %t 2>/dev/null | grep -cE '^(idle|mix|alloc)$')" -ge ${#NODES[@]} ]; }

up() {
    [ "$(id -u)" = 0 ] || die "starting Slurm's daemons needs root"
    install_packages
    mkdir -p "$HOME_DIR"/{etc,run,log,state,spool}
    chmod 755 "$HOME_DIR" "$HOME_DIR"/*
    write_names
    [ -e "$SLURM_CONF" ] || write_config
    start_munge
    running "$HOME_DIR/run/slurmctld.pid" slurmctld || setsid slurmctld </dev/null
    for node in "${NODES[@]}"; do start_node "$node"; done
    for _ in $(seq 150); do
        all_idle && return
        sleep 0.2
    done
    sinfo -N -l >&2 || true
    die "the nodes didn't come up within 30 s; logs are in $HOME_DIR/log"
}

stop() { # PIDFILE NAME
    local pid
    if running "$1" "$2"; then
        pid=$(cat "$1")
        kill "$pid"
        for _ in $(seq 100); do running "$1" "$2" || break; sleep 0.1; done
        if running "$1" "$2"; then kill -9 "$pid"; fi
    fi
    rm -f "$1"
}

left_behind() { # process numbers of jobs, and of daemons of ours without a pid file
    local place told
    for place in /proc/[0-9]*; do
        told=$(tr '\0' '\n' <"$place/environ" | grep -xE "SLURM_CONF=$SLURM_CONF|SLURMD_NODENAME=.*") || continue
        case "$told" in *"$SLURM_CONF"*) ;; *) continue ;; esac
        case "$told $(cat "$place/comm")" in
            *SLURMD_NODENAME=* | *slurmd | *slurmstepd) echo "${place#/proc/}" ;;
        esac
    done
} 2>/dev/null

down() {
    [ -d "$HOME_DIR" ] || return 0
    [ -e "$SLURM_CONF" ] || die "$HOME_DIR isn't a cluster's folder: it is left as it is"
    if running "$HOME_DIR/run/slurmctld.pid" slurmctld; then
        scancel --state=PENDING -p low,high 2>/dev/null || true
        scancel -p low 2>/dev/null || true
        scancel -p high 2>/dev/null || true
        for _ in $(seq 100); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
    fi
    for node in "${NODES[@]}"; do stop "$HOME_DIR/run/$node.pid" slurmd; done
    left_behind | xargs -r kill -9 2>/dev/null || true # jobs that scancel didn't end
    stop "$HOME_DIR/run/slurmctld.pid" slurmctld
    stop "$HOME_DIR/munge/run/pid" munged
    for node in "${NODES[@]}"; do
        [ ! -d "/sys/fs/cgroup/freezer/slurm_$node" ] ||
            find "/sys/fs/cgroup/freezer/slurm_$node" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
    # Rewritten in place: in containers /etc/hosts is a mount and can't be replaced.
    if grep -qF "$MARK" /etc/hosts; then
        local kept
        kept=$(grep -vF "$MARK" /etc/hosts || true)
        printf '%s\n' "$kept" >/etc/hosts
    fi
    rm -rf "$HOME_DIR"
}

user_signal() {
    sed -i '/^SlurmctldParameters=/d' "$SLURM_CONF"
    case "$1" in
        on) sed -i '/^PreemptMode=/a SlurmctldParameters=preempt_send_user_signal' "$SLURM_CONF" ;;
        off) ;;
        *) die "user-signal takes on or off, got '$1'" ;;
    esac
    scontrol reconfigure
}

case "${1:-}" in
    up) up ;;
    down) down ;;
    start) start_node "${2:?a node}" ;;
    user-signal) user_signal "${2:-}" ;;
    config) echo "$SLURM_CONF" ;;
    *) die "takes up, down, start NODE, user-signal on|off or config" ;;
esac
