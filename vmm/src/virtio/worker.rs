//! Threads that serve queues: wait for doorbells, hold still while the machine is paused, leave when it stops.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::LONG;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Pause,
    Stop,
}

struct State {
    order: Order,
    /// The thread holds still, or is gone.
    still: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, order: Order) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.order = order;
        self.changed.notify_all();
        // It fails only when the counter is full, and then the thread is being woken already.
        let _ = self.wake.write(1);
        state
    }
}

/// A running thread; dropping it stops and joins it.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// The thread's side.
pub struct Control(Arc<Shared>);

/// An eventfd as something to wait for.
pub fn bell(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open as long as the eventfd that is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

/// Why a wait ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Wake {
    /// Which of the descriptors are ready.
    Ready(Vec<bool>),
    /// The time is over.
    Timeout,
    /// Leave.
    Stop,
}

impl Worker {
    /// Starts `body`, which must return once [`Control::wait`] says [`Wake::Stop`].
    pub fn spawn(name: String, body: impl FnOnce(&Control) + Send + 'static) -> io::Result<Worker> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { order: Order::Run, still: false }),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let control = Control(shared.clone());
        let run = move || {
            // Also where the body panics: else a pause would wait for it for ever.
            let _gone = Gone(control.0.clone());
            body(&control);
        };
        let thread = std::thread::Builder::new().name(name).spawn(run)?;
        Ok(Worker { shared, thread: Some(thread) })
    }

    /// Returns when the thread holds still between two requests.
    pub fn pause(&self) {
        let mut state = self.shared.give(Order::Pause);
        while !state.still {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets a paused thread go on.
    pub fn resume(&self) {
        drop(self.shared.give(Order::Run));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.shared.give(Order::Stop));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Says, when it is dropped, that the thread holds still for good.
struct Gone(Arc<Shared>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.lock().still = true;
        self.0.changed.notify_all();
    }
}

impl Control {
    /// Waits until one of `fds` is readable, `limit` is over, or the thread is to leave. Pauses happen here.
    pub fn wait(&self, fds: &[BorrowedFd<'_>], limit: Option<Duration>) -> Wake {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            if !self.obey() {
                return Wake::Stop;
            }
            let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                None => PollTimeout::NONE,
                Some(left) => PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
            };
            let mut polled = vec![PollFd::new(bell(&self.0.wake), PollFlags::POLLIN)];
            polled.extend(fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
            match poll(&mut polled, timeout) {
                Ok(0) => return Wake::Timeout,
                Ok(_) => {}
                // Only EINTR is to be expected; whatever else there is must not make this a busy loop.
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => return Wake::Stop,
            }
            let mut ready: Vec<bool> = polled.iter().map(|p| p.any().unwrap_or(true)).collect();
            if !ready.remove(0) {
                return Wake::Ready(ready);
            }
            let _ = self.0.wake.read();
        }
    }

    /// Holds still while paused; whether to go on.
    fn obey(&self) -> bool {
        let mut state = self.0.lock();
        while state.order == Order::Pause {
            state.still = true;
            self.0.changed.notify_all();
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.still = false;
        state.order != Order::Stop
    }
}

/// Whether a thread that a doorbell wakes takes the processor from the guest that rang, where the two share one.
///
/// If it does, a lone request is answered soonest; but of many that the guest has to make, each is then answered before
/// the next is made, with an exit, two switches and an interrupt for each. If it does not (SCHED_BATCH, sched(7)), the
/// guest goes on until it has nothing more to do, and all it asked for is found together. How deep the queue is shows only
/// where the guest was let go on, so that is tried now and then.
#[derive(Debug)]
pub struct Manners {
    gives_way: bool,
    /// Visits until a trial is thought over.
    left: u32,
    /// What was found since it began.
    found: u32,
    /// When it began, or when the last one ended.
    since: Instant,
    /// How long to wait for the next one.
    rest: Duration,
}

/// So many requests a visit are worth waiting for.
const DEEP: u32 = 4;
/// Visits of a trial: the first ones find less, as the scheduler owes time to a thread that slept much.
const TRIAL: u32 = 16;
/// Between two trials: at least so long, and so many times what the last one took.
const REST: Duration = Duration::from_millis(50);
const RESTS: u32 = 15;

impl Manners {
    /// Does not give way; the first trial is a rest away from `now`.
    pub fn new(now: Instant) -> Manners {
        Manners { gives_way: false, left: 0, found: 0, since: now, rest: REST }
    }

    /// How old an answer may become before the driver is told: who has much under way waits for none in particular.
    pub fn long(&self) -> Duration {
        if self.gives_way { 8 * LONG } else { LONG }
    }

    /// Takes note of a visit to the queue that ended `now`, and sets this thread's policy for the next.
    pub fn visited(&mut self, found: u32, now: Instant) {
        let past = now.saturating_duration_since(self.since);
        let gives_way = if self.gives_way {
            self.found = self.found.saturating_add(found);
            self.left = self.left.saturating_sub(1);
            if self.left > 0 {
                return;
            }
            self.found >= DEEP * TRIAL
        } else if past >= self.rest {
            true
        } else {
            return;
        };
        let rest = if gives_way { self.rest } else { REST.max(RESTS * past) };
        *self = Manners { gives_way, left: TRIAL, found: 0, since: now, rest };
        give_way(gives_way);
    }
}

fn give_way(yes: bool) {
    // SAFETY: all zeros is a valid sched_param, and the one these policies take.
    let param: libc::sched_param = unsafe { std::mem::zeroed() };
    let policy = if yes { libc::SCHED_BATCH } else { libc::SCHED_OTHER };
    // SAFETY: the pointer is valid during the call; 0 is this thread. Where it is refused all goes on as before.
    unsafe { libc::sched_setscheduler(0, policy, &param) };
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_paused_thread_holds_still_and_a_stopped_one_is_gone() {
        let doorbell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let (rung, served) = (doorbell.try_clone().unwrap(), Arc::new(AtomicU32::new(0)));
        let count = served.clone();
        let worker = Worker::spawn("test".into(), move |control| {
            while let Wake::Ready(_) = control.wait(&[bell(&rung)], None) {
                rung.read().unwrap();
                count.fetch_add(1, Ordering::SeqCst);
            }
        })
        .unwrap();
        let until = |n| {
            while served.load(Ordering::SeqCst) < n {
                std::thread::yield_now()
            }
        };
        doorbell.write(1).unwrap();
        until(1);
        worker.pause();
        doorbell.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(served.load(Ordering::SeqCst), 1);
        worker.resume();
        until(2);
        worker.pause();
        drop(worker);
        assert_eq!(Arc::strong_count(&served), 1, "its thread is gone");
    }

    #[test]
    fn a_thread_that_panicked_holds_nobody_up() {
        let worker = Worker::spawn("test".into(), |_| panic!("as a test wants it")).unwrap();
        worker.pause();
        worker.resume();
        worker.pause();
    }

    #[test]
    fn who_finds_many_requests_gives_way_and_tries_now_and_then() {
        // SAFETY: it takes a number and changes nothing; 0 is this thread.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let start = Instant::now();
        let mut manners = Manners::new(start);
        let mut visits = |times, found, at: u64| {
            (0..times).for_each(|_| manners.visited(found, start + Duration::from_millis(at)));
            policy()
        };
        assert_eq!(visits(1000, 100, 49), libc::SCHED_OTHER);
        assert_eq!(visits(1, 1, 50), libc::SCHED_BATCH, "tried");
        assert_eq!(visits(TRIAL * 5, DEEP, 80), libc::SCHED_BATCH, "worth it");
        assert_eq!(visits(TRIAL, DEEP - 1, 100), libc::SCHED_OTHER);
        assert_eq!(
            visits(1000, 100, 100 + 15 * 20 - 1),
            libc::SCHED_OTHER,
            "a trial is a small part of the time"
        );
        assert_eq!(visits(1, 100, 100 + 15 * 20), libc::SCHED_BATCH);
    }

    #[test]
    fn a_wait_ends_with_its_time() {
        let (tell, told) = std::sync::mpsc::channel();
        let worker = Worker::spawn("test".into(), move |control| {
            let _ = tell.send(control.wait(&[], Some(Duration::from_millis(1))));
        });
        assert_eq!(told.recv().unwrap(), Wake::Timeout);
        drop(worker);
    }
}
