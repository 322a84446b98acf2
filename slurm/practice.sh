#!/usr/bin/env bash
# A real Slurm on this machine, to practise on: four nodes with two fake GPUs each, all of it in one private folder.
#
#   eval "$(slurm/practice.sh up)"   start it, or what is missing of it, and point this shell at it
#   slurm/practice.sh status         nodes, queue, and how processes are tracked
#   slurm/practice.sh env            the line that points a shell at it
#   slurm/practice.sh down           cancel its jobs, stop its daemons, remove its folder
#
# SYNTHOS_PRACTICE            its folder (default /tmp/synthos-practice-$UID); two folders are two clusters
# SYNTHOS_PRACTICE_PROCTRACK  linuxproc | cgroup (default: cgroup where the freezer is writable). It decides who in a job
#                             is signalled: with cgroup, as on most clusters, only the process that srun started
#
# It has its own munge key and socket, listens on the loopback only (where /etc/hosts gives this machine's name 127.0.0.1;
# elsewhere `up` says so), and touches no Slurm that it did not start.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

FOLDER=$(realpath -m "${SYNTHOS_PRACTICE:-/tmp/synthos-practice-$UID}")
CONF=$FOLDER/slurm.conf
MARKER=$FOLDER/synthos-practice # only `up` writes it: how processes are tracked, and why
FREEZER=/sys/fs/cgroup/freezer
OUR_FREEZER=$FREEZER/practice${FOLDER//\//-}
NODES=(node1 node2 node3 node4)
DAEMONS=(munged slurmctld "${NODES[@]}")
COMMAND="${SYNTHOS_PRACTICE:+SYNTHOS_PRACTICE=$FOLDER }$0" # what a person types
START_SECONDS=40
CANCEL_SECONDS=15 # longer than KillWait

say() { echo "practice: $*" >&2; }
die() {
  say "$@"
  exit 1
}
ask() { SLURM_CONF=$CONF timeout 20 "$@"; }
ours() { [[ -O $FOLDER && -f $MARKER ]]; }

refuse_what_is_not_ours() {
  local missing
  missing=$(for tool in munged slurmctld slurmd sinfo; do command -v "$tool" >/dev/null || echo -n " $tool"; done)
  [[ -z $missing ]] || die "not found:$missing; install them with: apt-get install slurm-wlm munge"
  ((UID == 0)) || die "only root can start a Slurm that runs jobs; this is user $UID"
  # Paths of sockets below it have to stay within 107 characters, and slurm.conf gives some characters a meaning.
  [[ $FOLDER =~ ^[A-Za-z0-9_./-]{1,60}$ ]] || die "SYNTHOS_PRACTICE=$FOLDER: at most 60 of the characters A-Z a-z 0-9 _ . / -"
  [[ -z ${SLURM_CONF:-} || $SLURM_CONF == "$CONF" ]] || die "SLURM_CONF=$SLURM_CONF is not this cluster; unset it first"
  [[ ! -e $FOLDER ]] || ours || die "$FOLDER exists and is no practice cluster; not touched"
}

# Daemons: each has a pid file, and a command line that no daemon of another folder has.

command_of() {
  case $1 in
    munged) echo munged --force "--socket=$FOLDER/munge.socket" "--key-file=$FOLDER/munge.key" \
      "--seed-file=$FOLDER/munge.seed" "--log-file=$FOLDER/log/munged.log" "--pid-file=$FOLDER/pid/munged" ;;
    slurmctld) echo slurmctld -f "$CONF" ;;
    *) echo slurmd -f "$CONF" -N "$1" ;;
  esac
}

runs() { # pid, daemon; false where that pid has become another's
  [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline") == "$(command_of "$2") " ]]
}

pid_of() { # prints nothing where the daemon does not run
  local pid
  pid=$(cat "$FOLDER/pid/$1" 2>/dev/null) || return 0
  ! runs "$pid" "$1" || echo "$pid"
}

start() { # with a bare environment (what is exported here is not theirs), and no pipe of ours, or $(... up) would not end
  # shellcheck disable=SC2046 # the words of a command
  env -i PATH="$PATH" $(command_of "$1") </dev/null >>"$FOLDER/log/$1.start" 2>&1 || say "$1 does not start"
}

stop() {
  local pid signal
  pid=$(pid_of "$1")
  # Slurm's daemons remove their pid file long before they end, and slurmd may wait for what is not there any more.
  for signal in TERM KILL; do
    for _ in {1..15}; do
      [[ -n $pid ]] && runs "$pid" "$1" || return 0
      kill "-$signal" "$pid" 2>/dev/null || true
      sleep 0.2
    done
  done
  die "$1 (process $pid) does not end"
}

# up

free_ports() { # prints the first of five neighbours that nothing listens on, below the range of the kernel's own choices
  local first port
  while true; do
    first=$((20000 + 5 * (RANDOM % 2000)))
    for port in $(seq $first $((first + 4))); do
      ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
    done
    echo $first
    return
  done
}

choose_tracking() { # prints the plugin's name and the reason
  local wanted=${SYNTHOS_PRACTICE_PROCTRACK:-auto}
  case $wanted in
    linuxproc) echo "linuxproc (SYNTHOS_PRACTICE_PROCTRACK)" && return ;;
    cgroup | auto) ;;
    *) die "SYNTHOS_PRACTICE_PROCTRACK=$wanted: linuxproc or cgroup" ;;
  esac
  if [[ -d $OUR_FREEZER ]] || mkdir "$OUR_FREEZER" 2>/dev/null && [[ -e $OUR_FREEZER/freezer.state ]]; then
    echo "cgroup ($FREEZER is writable)"
  elif [[ $wanted == auto ]]; then
    echo "linuxproc ($FREEZER is no writable freezer)"
  else
    die "SYNTHOS_PRACTICE_PROCTRACK=cgroup: $FREEZER is no writable freezer"
  fi
}

write_folder() {
  local port tracking
  tracking=$(choose_tracking)
  mkdir -m 700 "$FOLDER"
  echo "$tracking" >"$MARKER"
  mkdir "$FOLDER"/{cgroup,dev,log,pid,spool,state} "$FOLDER"/spool/{node1,node2,node3,node4}
  mknod "$FOLDER/dev/nvidia0" c 1 3 && mknod "$FOLDER/dev/nvidia1" c 1 3 # what Slurm takes for GPUs: /dev/null, twice
  (umask 077 && head -c 1024 /dev/urandom >"$FOLDER/munge.key")
  # A folder of our own in the freezer: neither job 1 of two clusters nor anybody else's processes can meet there.
  ln -s "$OUR_FREEZER" "$FOLDER/cgroup/freezer"
  printf '%s\n' "CgroupPlugin=cgroup/v1" "CgroupMountpoint=$FOLDER/cgroup" "CgroupAutomount=no" >"$FOLDER/cgroup.conf"
  echo "NodeName=node[1-4] Name=gpu File=$FOLDER/dev/nvidia[0-1]" >"$FOLDER/gres.conf"
  loopback_only || say "listens on every address, because $(uname -n) is not 127.0.0.1 in /etc/hosts; only its munge key opens"
  port=$(free_ports)
  slurm_conf "$port" "${tracking%% *}" >"$CONF"
}

loopback_only() { # Slurm listens on one address only if that is what the name of this machine stands for
  [[ $(getent ahostsv4 "$(uname -n)") == "127.0.0.1 "* ]]
}

slurm_conf() { # port, plugin for process tracking
  cat <<CONF
SlurmctldPort=$1
$(loopback_only && echo "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny")
AuthInfo=socket=$FOLDER/munge.socket
SlurmctldPidFile=$FOLDER/pid/slurmctld
SlurmdPidFile=$FOLDER/pid/%n
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/%n.log
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool/%n
ProctrackType=proctrack/$2
NodeName=node[1-4] NodeHostname=localhost NodeAddr=127.0.0.1 Port=$(($1 + 1))-$(($1 + 4)) CPUs=4 RealMemory=5000 Gres=gpu:2
CONF
  cat "$(dirname "${BASH_SOURCE[0]}")/practice.conf"
}

nodes_in_service() { # how many answer and take jobs
  ask sinfo --noheader --Node --partition=batch --format=%T 2>/dev/null | grep -cE '^(idle|mixed|allocated|completing)$' || true
}

up() {
  local daemon missing=()
  [[ -e $FOLDER ]] || write_folder
  [[ -e $CONF ]] || die "$FOLDER was not finished; take it down first: $COMMAND down"
  [[ ${SYNTHOS_PRACTICE_PROCTRACK:-} == "" || $(<"$MARKER") == "$SYNTHOS_PRACTICE_PROCTRACK "* ]] ||
    die "SYNTHOS_PRACTICE_PROCTRACK=$SYNTHOS_PRACTICE_PROCTRACK: it is there with $(<"$MARKER"); take it down first"
  for daemon in "${DAEMONS[@]}"; do
    [[ -n $(pid_of "$daemon") ]] || missing+=("$daemon")
  done
  if ((${#missing[@]} == 0)); then
    say "already up in $FOLDER"
  else
    for daemon in "${missing[@]}"; do start "$daemon"; done
    wait_for_nodes
    say "up in $FOLDER: ${NODES[*]} with 4 CPUs and 2 GPUs (fake) each, partitions batch and urgent (it preempts batch)"
  fi
  say "a shell sees it after: eval \"\$($COMMAND env)\". Then: sinfo, sbatch, squeue. The end: $COMMAND down"
  line_for_shell
}

wait_for_nodes() {
  local deadline=$((SECONDS + START_SECONDS))
  while (($(nodes_in_service) < ${#NODES[@]})); do
    if ((SECONDS > deadline)); then
      ask sinfo --Node --long >&2 || true
      tail -n 8 "$FOLDER"/log/* >&2
      die "not every node came up within $START_SECONDS s. The logs stay in $FOLDER/log until: $COMMAND down"
    fi
    sleep 0.3
  done
}

line_for_shell() { echo "export SLURM_CONF=$CONF"; }

# down

job_processes() { # prints the pids of what slurmd started: its step daemons, and all that has the environment of a job
  local process environ
  for process in /proc/[0-9]*; do
    environ=" $(tr '\0' ' ' <"$process/environ")"
    if [[ $(readlink "$process/cwd") == "$FOLDER/log" && $(<"$process/comm") == slurmstepd ]] ||
      [[ $environ == *" SLURM_CONF=$CONF "* && $environ == *" SLURMD_NODENAME="* ]]; then
      echo "${process#/proc/}"
    fi
  done
} 2>/dev/null

cancel_jobs() {
  local deadline=$((SECONDS + CANCEL_SECONDS))
  [[ -n $(pid_of slurmctld) ]] && ask scancel --user=root || return 0
  while [[ -n $(ask squeue --noheader) ]] && ((SECONDS < deadline)); do sleep 0.3; done
}

kill_job_processes() {
  local processes
  for _ in {1..50}; do
    processes=$(job_processes)
    [[ -n $processes ]] || return 0
    xargs kill -KILL <<<"$processes" 2>/dev/null || true
    sleep 0.2
  done
  die "processes of jobs do not end: $processes"
}

down() {
  local daemon
  [[ -e $FOLDER ]] || { say "nothing is up in $FOLDER" && return; }
  cancel_jobs
  stop slurmctld
  kill_job_processes # which slurmd would wait for
  for daemon in "${NODES[@]}" munged; do stop "$daemon"; done
  [[ ! -d $OUR_FREEZER ]] || find "$OUR_FREEZER" -depth -type d -exec rmdir {} \;
  rm -r "$FOLDER"
  say "down; $FOLDER is removed"
}

status() {
  ours || die "nothing is up in $FOLDER"
  local daemon
  for daemon in "${DAEMONS[@]}"; do
    [[ -n $(pid_of "$daemon") ]] || echo "$daemon does not run; up starts it again"
  done
  echo "process tracking: $(<"$MARKER")"
  ask sinfo --Node --format="%8N %10P %12T %16G %E"
  ask squeue
}

case ${1:-} in
  up | down | status | env) refuse_what_is_not_ours ;;
  *) die "$0 up | down | status | env" ;;
esac
case $1 in
  env)
    ours || die "nothing is up in $FOLDER"
    line_for_shell
    ;;
  *) "$1" ;;
esac
