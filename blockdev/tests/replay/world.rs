//! Files in memory on a disk that loses power: what was synced is there then, and any part of what was not.

#![allow(dead_code, reason = "each program uses a part")]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hutch_blockdev::store::Store;

const PAGE: usize = 4096;
const SECTOR: usize = 512;
/// The longest file.
const MOST: u64 = 64 << 20;

/// xorshift64: the same choices from the same seed, everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        // Neighbouring seeds are far apart then, and none is 0.
        Random((seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

type Page = Arc<[u8; PAGE]>;

/// What a file holds. Copies share what they have in common.
#[derive(Clone, Default)]
pub struct Content {
    /// As far as there is data.
    pages: Vec<Option<Page>>,
    len: u64,
}

impl Content {
    pub fn of(bytes: &[u8]) -> Content {
        let mut content = Content::default();
        content.apply(&Event::Write(0, bytes.into()));
        content
    }

    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        self.read(0, &mut bytes);
        bytes
    }

    fn read(&self, at: u64, to: &mut [u8]) {
        let (mut at, mut rest) = (at as usize, to);
        while !rest.is_empty() {
            let within = at % PAGE;
            let count = (PAGE - within).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            match self.pages.get(at / PAGE) {
                Some(Some(page)) => now.copy_from_slice(&page[within..within + count]),
                _ => now.fill(0),
            }
            (at, rest) = (at + count, later);
        }
    }

    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let (mut at, mut rest) = (at as usize, bytes);
        self.len = self.len.max((at + bytes.len()) as u64);
        let pages = (at + bytes.len()).div_ceil(PAGE);
        if self.pages.len() < pages {
            self.pages.resize(pages, None);
        }
        while !rest.is_empty() {
            let within = at % PAGE;
            let (now, later) = rest.split_at((PAGE - within).min(rest.len()));
            let page = &mut self.pages[at / PAGE];
            match (page.as_mut(), now.first_chunk::<PAGE>()) {
                (_, Some(whole)) => *page = Some(Arc::new(*whole)),
                (Some(page), None) => Arc::make_mut(page)[within..within + now.len()].copy_from_slice(now),
                (None, None) => {
                    let mut new = [0; PAGE];
                    new[within..within + now.len()].copy_from_slice(now);
                    *page = Some(Arc::new(new));
                }
            }
            (at, rest) = (at + now.len(), later);
        }
    }

    fn zero(&mut self, at: u64, end: u64) {
        let (mut at, end) = (at as usize, (end as usize).min(self.pages.len() * PAGE));
        while at < end {
            let within = at % PAGE;
            let count = (PAGE - within).min(end - at);
            match &mut self.pages[at / PAGE] {
                page if count == PAGE => *page = None,
                Some(page) => Arc::make_mut(page)[within..within + count].fill(0),
                None => {}
            }
            at += count;
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len);
            self.pages.truncate(len.div_ceil(PAGE as u64) as usize);
        }
        self.len = len;
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Write(at, bytes) => self.write(*at, bytes),
            Event::Zero(at, end) => self.zero(*at, *end),
            Event::Size(len) => self.set_len(*len),
        }
    }
}

/// One thing that was done to a file.
#[derive(Clone)]
pub enum Event {
    Write(u64, Arc<[u8]>),
    /// From the first to before the second.
    Zero(u64, u64),
    Size(u64),
}

/// How a call fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Any that changes something, syncs among them, with this error.
    Errno(i32),
    /// As by ENOSPC, after half of what was to be written.
    Short,
    /// A sync, with EIO: what it was to make durable may never be.
    Sync,
    /// A read, with EIO.
    Read,
}

/// What is called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    Write,
    Change,
    Sync,
    Read,
}

/// Which call fails.
#[derive(Clone, Copy)]
struct Plan {
    left: u64,
    fault: Fault,
    /// All later ones fail too.
    stays: bool,
    /// The first that failed.
    met: Option<Call>,
}

/// A file, and what of it would survive.
#[derive(Clone, Default)]
pub struct File {
    now: Arc<Content>,
    synced: Arc<Content>,
    since: Vec<Event>,
    /// A sync failed: the kernel takes what it did not write for written.
    doubtful: bool,
}

impl File {
    /// What is left of it when power fails: what was synced, and some of the rest, in order, torn between sectors.
    pub fn survive(&self, random: &mut Random) -> Arc<Content> {
        // All, nothing, any part.
        let keep = random.below(4);
        if self.since.is_empty() || keep == 0 {
            return self.synced.clone();
        }
        if keep == 1 {
            return self.now.clone();
        }
        let mut left = Content::clone(&self.synced);
        for event in &self.since {
            match event {
                _ if random.one_in(4) => {}
                Event::Write(at, bytes) if random.one_in(2) => {
                    let (first, mut which) = (random.one_in(2), 0);
                    for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                        // By runs of eight, or one by one.
                        if i % 8 == 0 || first {
                            which = random.below(2);
                        }
                        if which == 0 {
                            left.write(at + (i * SECTOR) as u64, sector);
                        }
                    }
                }
                Event::Zero(at, end) if random.one_in(2) => {
                    for page in (*at..*end).step_by(PAGE).filter(|_| random.one_in(2)) {
                        left.zero(page, (page + PAGE as u64).min(*end));
                    }
                }
                event => left.apply(event),
            }
        }
        Arc::new(left)
    }

    /// What it holds, if that is all synced.
    pub fn settled(&self) -> Option<&Arc<Content>> {
        self.since.is_empty().then_some(&self.synced)
    }
}

#[derive(Default)]
struct State {
    files: Vec<File>,
    /// How many events from now power fails, and what there was then.
    fails: Option<u64>,
    failed: Option<Vec<File>>,
    plan: Option<Plan>,
}

/// All files of a host.
#[derive(Clone, Default)]
pub struct World(Arc<Mutex<State>>);

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A world whose files hold this, durably.
    pub fn of(files: Vec<Arc<Content>>) -> World {
        let file = |content: Arc<Content>| File { now: content.clone(), synced: content, ..File::default() };
        let world = World::default();
        world.state().files = files.into_iter().map(file).collect();
        world
    }

    /// A new, empty file.
    pub fn make(&self) -> Mem {
        let mut state = self.state();
        state.files.push(File::default());
        Mem(self.clone(), state.files.len() - 1)
    }

    /// The file of this number.
    pub fn file(&self, number: usize) -> Mem {
        Mem(self.clone(), number)
    }

    /// All files as they are.
    pub fn files(&self) -> Vec<File> {
        self.state().files.clone()
    }

    /// Power will fail so many events from now.
    pub fn fail_after(&self, events: u64) {
        self.state().fails = Some(events);
    }

    /// The call after so many of those that `fault` is of will fail, and all later ones where it `stays`.
    pub fn plan(&self, calls: u64, fault: Fault, stays: bool) {
        self.state().plan = Some(Plan { left: calls, fault, stays, met: None });
    }

    /// Which call has failed.
    pub fn met(&self) -> Option<Call> {
        self.state().plan.and_then(|plan| plan.met)
    }

    /// Whether a sync of this file failed that had something to do.
    pub fn is_doubtful(&self, file: usize) -> bool {
        self.state().files.get(file).is_some_and(|file| file.doubtful)
    }

    /// From now on no call fails.
    pub fn relent(&self) {
        if let Some(plan) = &mut self.state().plan {
            (plan.left, plan.stays) = (u64::MAX, false);
        }
    }

    /// What there was when it failed, if that has come.
    pub fn failed(&self) -> Option<Vec<File>> {
        let mut state = self.state();
        state.fails = None;
        state.failed.take()
    }
}

impl State {
    /// The fault that this call meets.
    fn meets(&mut self, call: Call) -> Option<Fault> {
        let plan = self.plan.as_mut()?;
        let concerned = match plan.fault {
            Fault::Errno(_) | Fault::Short => call != Call::Read,
            Fault::Sync => call == Call::Sync,
            Fault::Read => call == Call::Read,
        };
        if !concerned || plan.met.is_some() && !plan.stays {
            return None;
        }
        if plan.left > 0 {
            plan.left -= 1;
            return None;
        }
        plan.met = plan.met.or(Some(call));
        Some(plan.fault)
    }

    /// Before a sync, and after all else, so that what was under way may be there in part.
    fn passed(&mut self) {
        self.fails = match self.fails {
            Some(0) => {
                self.failed = Some(self.files.clone());
                None
            }
            left => left.map(|left| left - 1),
        };
    }
}

/// A file of a world; clones are the same.
#[derive(Clone)]
pub struct Mem(World, usize);

impl Mem {
    /// Its number.
    pub fn number(&self) -> usize {
        self.1
    }

    fn content(&self) -> Arc<Content> {
        self.0.state().files.get(self.1).map(|file| file.now.clone()).unwrap_or_default()
    }

    fn change(&self, end: Option<u64>, event: impl FnOnce(&Content) -> Event) -> io::Result<()> {
        if end.is_none_or(|end| end > MOST) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let mut state = self.0.state();
        let Some(now) = state.files.get(self.1).map(|file| file.now.clone()) else { return Ok(()) };
        let mut event = event(&now);
        drop(now);
        let call = if matches!(event, Event::Write(..)) { Call::Write } else { Call::Change };
        let fault = state.meets(call);
        if let (Some(Fault::Short), Event::Write(at, bytes)) = (fault, &event) {
            event = Event::Write(*at, bytes[..bytes.len() / 2 / SECTOR * SECTOR].into());
        }
        if let Some(file) = state.files.get_mut(self.1)
            && (fault.is_none() || fault == Some(Fault::Short) && call == Call::Write)
        {
            Arc::make_mut(&mut file.now).apply(&event);
            file.since.push(event);
        }
        state.passed();
        fault.map_or(Ok(()), |fault| Err(fault.error()))
    }

    fn meets(&self, call: Call) -> io::Result<()> {
        self.0.state().meets(call).map_or(Ok(()), |fault| Err(fault.error()))
    }
}

impl Fault {
    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(match self {
            Fault::Errno(errno) => errno,
            Fault::Short => libc::ENOSPC,
            Fault::Sync | Fault::Read => libc::EIO,
        })
    }
}

impl Store for Mem {
    unsafe fn read(&self, offset: u64, bufs: &[libc::iovec]) -> io::Result<()> {
        self.meets(Call::Read)?;
        let content = self.content();
        let mut at = offset;
        for buf in bufs {
            // SAFETY: the caller promises buffers that are mapped and writable; the zeros make them bytes.
            let to = unsafe {
                buf.iov_base.cast::<u8>().write_bytes(0, buf.iov_len);
                std::slice::from_raw_parts_mut(buf.iov_base.cast::<u8>(), buf.iov_len)
            };
            content.read(at.min(MOST), to);
            at = at.saturating_add(buf.iov_len as u64);
        }
        Ok(())
    }

    unsafe fn write(&self, offset: u64, bufs: &[libc::iovec]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(bufs.iter().map(|buf| buf.iov_len).sum());
        for buf in bufs {
            // SAFETY: the caller promises buffers that are mapped and readable.
            bytes.extend_from_slice(unsafe {
                std::slice::from_raw_parts(buf.iov_base.cast::<u8>(), buf.iov_len)
            });
        }
        let end = offset.checked_add(bytes.len() as u64);
        self.change(end, |_| Event::Write(offset, bytes.into()))
    }

    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()> {
        // A hole does not make a file longer.
        match (offset.checked_add(len), punch) {
            (Some(end), false) if end > self.content().len => {
                self.change(Some(end), |_| Event::Write(offset, vec![0; len as usize].into()))
            }
            (end, _) => self.change(Some(0), |now| Event::Zero(offset, end.unwrap_or(MOST).min(now.len))),
        }
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.0.state();
        state.passed();
        let fault = state.meets(Call::Sync);
        if let Some(file) = state.files.get_mut(self.1) {
            file.doubtful |= fault.is_some() && !file.since.is_empty();
            if file.doubtful || fault.is_some() {
                return fault.map_or(Ok(()), |fault| Err(fault.error()));
            }
            file.synced = file.now.clone();
            file.since.clear();
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.meets(Call::Read)?;
        Ok(self.content().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Some(len), |_| Event::Size(len))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.meets(Call::Read)?;
        let content = self.content();
        let first = usize::try_from(offset).unwrap_or(usize::MAX) / PAGE;
        let page = content.pages.iter().enumerate().skip(first).find(|(_, page)| page.is_some());
        let at = page.map(|(page, _)| offset.max((page * PAGE) as u64));
        Ok(at.filter(|at| *at < content.len))
    }
}
