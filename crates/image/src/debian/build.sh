# Makes a Debian on the NVMe disk out of the packages in the current folder. Runs in the small guest, as root, with busybox.
# Lines that begin with "step" tell the host how far it is: what was done so far, of how much, what comes next.
set -eu
target=/tmp/target
tools=/tmp/tools
debs=/tmp/debs

mkdir -p $target $tools
cd $debs
count=$(wc -l < packages)
# Each package is unpacked and set up; setting up takes about twice as long.
total=$((count * 3 + 4))
done=0
step() {
    echo "step $done $total $*"
}

# data FILE: the files in a package, as a tar archive.
data() {
    member=$(ar t "$1" | grep '^data\.tar')
    case $member in
        *.xz) ar p "$1" "$member" | xz -dc ;;
        *.gz) ar p "$1" "$member" | gzip -dc ;;
        *) echo "$1: $member is compressed in a way that is not known here" >&2; return 1 ;;
    esac
}
control() {
    member=$(ar t "$1" | grep '^control\.tar')
    case $member in
        *.xz) ar p "$1" "$member" | xz -dc ;;
        *.gz) ar p "$1" "$member" | gzip -dc ;;
        *) echo "$1: $member is compressed in a way that is not known here" >&2; return 1 ;;
    esac
}

step making the file system
for file in $(cat tools); do
    data "$file" | tar x -C $tools
done
mkdir -p $tools/dev
mount -t devtmpfs dev $tools/dev
chroot $tools /sbin/mke2fs -q -t ext4 -L root -E lazy_itable_init=1,lazy_journal_init=1,nodiscard /dev/nvme0n1
umount $tools/dev
rm -r $tools
mount -t ext4 -o noatime /dev/nvme0n1 $target
done=$((done + 2))

# Merged /usr, before packages bring folders of these names.
for folder in bin sbin lib lib64; do
    mkdir -p $target/usr/$folder
    ln -s usr/$folder $target/$folder
done
info=$target/var/lib/dpkg/info
mkdir -p $info $target/var/lib/dpkg/updates $target/var/lib/dpkg/triggers
: > $target/var/lib/dpkg/available
echo 1 > $info/format
control=/tmp/control
while read -r file; do
    step "unpacking ${file%%_*}"
    rm -rf $control
    mkdir $control
    control "$file" | tar x -C $control
    name=$(sed -n 's/^Package: //p' $control/control)
    qualified=$name
    if grep -q '^Multi-Arch: same$' $control/control; then
        qualified=$name:$(sed -n 's/^Architecture: //p' $control/control)
    fi
    data "$file" | tar xv -C $target > /tmp/list
    sed -e 's|^\./|/|' -e 's|/$||' -e 's|^$|/.|' /tmp/list > "$info/$qualified.list"
    for part in $control/*; do
        case ${part##*/} in
            control) ;;
            *) cp -p "$part" "$info/$qualified.${part##*/}" ;;
        esac
    done
    {
        sed -e '1a Status: install ok unpacked' $control/control
        if [ -s $control/conffiles ]; then
            echo Conffiles:
            sed -n -e 's|^/.*|& newconffile|' -e 's|^/| /|p' $control/conffiles
        fi
        echo
    } >> $target/var/lib/dpkg/status
    rm "$file"
    done=$((done + 1))
done < packages

# The kernel that Caisson starts brings no package of its own, only its modules.
data "$(cat kernel)" | tar x -C $target ./lib/modules
rm "$(cat kernel)"

mount -t proc proc $target/proc
mount -t sysfs sys $target/sys
mount -t devtmpfs dev $target/dev
mount -t tmpfs run $target/run
# What the scripts of packages need before any of them has run.
cp $target/usr/share/base-passwd/passwd.master $target/etc/passwd
cp $target/usr/share/base-passwd/group.master $target/etc/group
[ -e $target/usr/bin/awk ] || ln -s mawk $target/usr/bin/awk
printf '#!/bin/sh\nexit 101\n' > $target/usr/sbin/policy-rc.d
chmod 755 $target/usr/sbin/policy-rc.d
echo caisson > $target/etc/hostname
printf '127.0.0.1\tlocalhost\n127.0.1.1\tcaisson\n::1\tlocalhost ip6-localhost ip6-loopback\n' > $target/etc/hosts
# By absolute paths: busybox runs its own applets for names that it knows, also after chroot.
inside() {
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive \
        DEBCONF_NONINTERACTIVE_SEEN=true chroot $target "$@"
}
configure() {
    inside /usr/bin/dpkg "$@" > /tmp/said 2>&1 &
    dpkg=$!
    while kill -0 $dpkg 2> /dev/null; do
        sleep 1
        finished=$(grep -c '^Setting up' /tmp/said) || true
        [ "$finished" -eq "$last" ] || {
            last=$finished
            done=$((before + 2 * finished))
            step "setting up $(sed -n 's/^Setting up \([^ :]*\).*/\1/p' /tmp/said | tail -n 1)"
        }
    done
    wait $dpkg || return 1
}
inside /usr/sbin/ldconfig
before=$done
last=0
# These are needed by the scripts of all others, and need each other.
configure --force-depends --configure base-passwd base-files libc6 perl-base mawk debconf || {
    cat /tmp/said >&2
    exit 1
}
before=$done
last=0
configure --configure -a || {
    cat /tmp/said >&2
    exit 1
}
rm $target/usr/sbin/policy-rc.d
inside /usr/sbin/depmod -a "$(ls $target/lib/modules)"

step finishing
cp sources.list $target/etc/apt/sources.list
printf 'LANG=C.UTF-8\n' > $target/etc/default/locale
printf '/dev/nvme0n1 / ext4 defaults,noatime 0 0\n' > $target/etc/fstab
: > $target/etc/machine-id
rm -f $target/var/lib/dbus/machine-id
mkdir -p $target/usr/lib/caisson
cp init login-user $target/usr/lib/caisson/
chmod 755 $target/usr/lib/caisson/*
cp caisson-user.service $target/etc/systemd/system/
mkdir -p $target/etc/systemd/system/serial-getty@ttyS0.service.d
cp autologin.conf $target/etc/systemd/system/serial-getty@ttyS0.service.d/
inside /usr/bin/systemctl enable caisson-user.service 2> /dev/null
inside /usr/bin/systemctl mask systemd-networkd-wait-online.service getty@tty1.service 2> /dev/null
# Nobody sees a screen, and mounting disks by hand is the user's business.
echo '%sudo ALL=(ALL:ALL) NOPASSWD: ALL' > $target/etc/sudoers.d/caisson
chmod 440 $target/etc/sudoers.d/caisson
rm -rf $target/var/log/*.log $target/var/cache/apt/*.bin
for folder in run dev sys proc; do
    umount $target/$folder
done
umount $target
done=$total
step done
