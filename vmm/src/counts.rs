//! Counts that vCPU threads keep without locks.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use serde::Serialize;

use crate::config::Counters;
use crate::drives::{Drive, Drives};
use crate::virtio::net::NetCounts;

/// Why KVM returned to us.
#[derive(Debug, Clone, Copy)]
pub enum Exit {
    /// A port was read or written.
    Pio,
    /// A memory-mapped register was read or written.
    Mmio,
    /// A vCPU halted (only without the in-kernel irqchip).
    Hlt,
    /// A signal interrupted the guest.
    Intr,
    /// Anything else.
    Other,
}

const NAMES: [&str; 5] = ["pio", "mmio", "hlt", "intr", "other"];

/// The counters of one machine, over all its reboots.
pub struct Counts {
    started: Instant,
    exits: [AtomicU64; 5],
    /// Reboots so far.
    pub reboots: AtomicU64,
    user_space: Mutex<Option<(u64, u64, u64)>>,
}

impl Default for Counts {
    fn default() -> Self {
        Counts {
            started: Instant::now(),
            exits: Default::default(),
            reboots: AtomicU64::new(0),
            user_space: Mutex::new(None),
        }
    }
}

impl Counts {
    /// Counts one exit.
    pub fn exit(&self, exit: Exit) {
        self.exits[exit as usize].fetch_add(1, Relaxed);
    }

    /// Remembers when user space was first reached.
    pub fn mark_user_space(&self) {
        let exits = self.exits.iter().map(|n| n.load(Relaxed)).sum();
        let cpu = getrusage(UsageWho::RUSAGE_SELF)
            .map_or(0, |u| u.user_time().num_microseconds() + u.system_time().num_microseconds());
        let wall = self.started.elapsed().as_micros() as u64;
        let mut slot = self.user_space.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert((exits, cpu as u64, wall));
    }

    /// What the report says.
    pub fn counters(&self, console_bytes: u64) -> Counters {
        let exits: BTreeMap<_, _> =
            NAMES.iter().zip(&self.exits).map(|(name, n)| (name.to_string(), n.load(Relaxed))).collect();
        let mark = *self.user_space.lock().unwrap_or_else(PoisonError::into_inner);
        Counters {
            exits,
            exits_to_user_space: mark.map(|m| m.0),
            cpu_us_to_user_space: mark.map(|m| m.1),
            wall_us_to_user_space: mark.map(|m| m.2),
            reboots: self.reboots.load(Relaxed),
            console_bytes,
        }
    }
}

/// The devices' counters, by what the plan calls them; they count over all reboots.
#[derive(Clone, Default)]
pub struct Devices {
    /// The disks.
    pub drives: Drives,
    /// MAC of each interface, in the order of the plan.
    pub nets: Vec<(String, Arc<NetCounts>)>,
}

/// What one disk did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskStatus {
    /// Its serial: the volume's id.
    pub serial: String,
    /// Requests answered.
    pub requests: u64,
    /// Bytes the guest read.
    pub read_bytes: u64,
    /// Bytes the guest wrote.
    pub written_bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// A write waits for room on the host at present.
    pub no_space: bool,
    /// The guest was asked to let it go.
    pub leaving: bool,
    /// What its top layer is called.
    pub top: String,
    /// What is beneath that is durable, and others may read it.
    pub sealed: bool,
}

/// What one interface did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetStatus {
    /// Its MAC.
    pub mac: String,
    /// Frames to the guest.
    pub received_frames: u64,
    /// Bytes to the guest, headers included.
    pub received_bytes: u64,
    /// Frames from the guest.
    pub sent_frames: u64,
    /// Bytes from the guest, headers included.
    pub sent_bytes: u64,
    /// Frames that the guest sent and the tap did not take.
    pub dropped: u64,
}

impl Devices {
    /// The disks' counters now.
    pub fn disk_status(&self) -> Vec<DiskStatus> {
        let status = |Drive { serial, counts, leaving, top, stack, .. }: Drive| DiskStatus {
            serial,
            requests: counts.requests.load(Relaxed),
            read_bytes: counts.bytes[0].load(Relaxed),
            written_bytes: counts.bytes[1].load(Relaxed),
            errors: counts.errors.load(Relaxed),
            no_space: counts.no_space.load(Relaxed),
            leaving: leaving.is_some(),
            top,
            sealed: stack.is_none_or(|stack| stack.is_sealed()),
        };
        self.drives.all().into_iter().map(status).collect()
    }

    /// The interfaces' counters now.
    pub fn net_status(&self) -> Vec<NetStatus> {
        let status = |(mac, counts): &(String, Arc<NetCounts>)| NetStatus {
            mac: mac.clone(),
            received_frames: counts.frames[0].load(Relaxed),
            received_bytes: counts.bytes[0].load(Relaxed),
            sent_frames: counts.frames[1].load(Relaxed),
            sent_bytes: counts.bytes[1].load(Relaxed),
            dropped: counts.dropped.load(Relaxed),
        };
        self.nets.iter().map(status).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hutch_blockdev::Format;

    #[test]
    fn devices_tell_each_counter_under_its_own_name() {
        let drives = Drives::default();
        for serial in ["vol1", "vol2"] {
            let file = tempfile::tempfile().unwrap();
            let drive = Drive::open("i-1", serial, vec![(file, Format::Raw).into()], false).unwrap();
            assert!(drives.add(drive));
        }
        assert!(drives.leave("vol1").is_some());
        let devices =
            Devices { drives: drives.clone(), nets: vec![("02:00:00:00:00:01".into(), Arc::default())] };
        let disk = &drives.all()[1].counts;
        disk.requests.store(1, Relaxed);
        disk.bytes[0].store(2, Relaxed);
        disk.bytes[1].store(3, Relaxed);
        disk.errors.store(4, Relaxed);
        disk.no_space.store(true, Relaxed);
        let net = &devices.nets[0].1;
        net.frames[0].store(5, Relaxed);
        net.frames[1].store(6, Relaxed);
        net.bytes[0].store(7, Relaxed);
        net.bytes[1].store(8, Relaxed);
        net.dropped.store(9, Relaxed);
        let disks = serde_json::to_value(devices.disk_status()).unwrap();
        assert_eq!((&disks[0]["serial"], &disks[0]["no_space"]), (&"vol1".into(), &false.into()));
        assert_eq!(disks[0]["leaving"], true);
        let expected = serde_json::json!({ "serial": "vol2", "requests": 1, "read_bytes": 2, "written_bytes": 3,
            "errors": 4, "no_space": true, "leaving": false, "top": "", "sealed": true });
        assert_eq!(disks[1], expected);
        let expected = serde_json::json!([{ "mac": "02:00:00:00:00:01", "received_frames": 5,
            "received_bytes": 7, "sent_frames": 6, "sent_bytes": 8, "dropped": 9 }]);
        assert_eq!(serde_json::to_value(devices.net_status()).unwrap(), expected);
    }
}
