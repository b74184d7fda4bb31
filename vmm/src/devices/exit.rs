//! The exit port: how a guest's command hands its exit code back, and how a guest says that user space was reached.

use std::sync::Arc;

use crate::bus::Registers;
use crate::ending::{Ending, Outcome};

/// The byte registers at [`crate::config::EXIT_PORT`] and [`crate::config::USER_SPACE_PORT`].
pub struct ExitPort {
    ending: Arc<Ending>,
    user_space: Option<Box<dyn FnOnce() + Send>>,
}

impl ExitPort {
    /// `user_space` is called once, when the guest first marks user space.
    pub fn new(ending: Arc<Ending>, user_space: impl FnOnce() + Send + 'static) -> ExitPort {
        ExitPort { ending, user_space: Some(Box::new(user_space)) }
    }
}

impl Registers for ExitPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [code]) => self.ending.set(Outcome::Command(*code)),
            (1, [_]) => {
                if let Some(mark) = self.user_space.take() {
                    mark();
                }
            }
            _ => {}
        }
    }
}
