//! Why the store does not do something: for accounts its kind, as what the store says may tell keys of the machine's owner.

use std::error::Error as StdError;
use std::io;

use object_store::Error;
use object_store::client::{HttpError, HttpErrorKind};

use crate::fault::Fault;

/// Why an object was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// There is none.
    #[error("there is no object {0}")]
    Missing(String),
    /// Somebody else writes it.
    #[error("{0} is being written by another task; wait for that, or choose another name")]
    Busy(String),
    /// The store cannot be had, or refuses.
    #[error("the object store: {0}")]
    Failed(String),
}

impl From<ObjectError> for Fault {
    fn from(error: ObjectError) -> Fault {
        match error {
            ObjectError::Missing(_) => Fault::new("NoSuchKey", error.to_string()),
            ObjectError::Busy(_) => Fault::new("IncorrectState", error.to_string()),
            ObjectError::Failed(_) => Fault::new("Unavailable", format!("{error}; try again later")),
        }
    }
}

pub(super) type Result<T> = std::result::Result<T, ObjectError>;

pub(super) fn failed(why: &str) -> ObjectError {
    ObjectError::Failed(why.into())
}

/// All that an error says, for whoever set up the store.
pub(super) fn whole(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |&error| error.source()) {
        let cause = cause.to_string();
        // Most errors of the store tell their cause themselves.
        if !text.contains(&cause) {
            text.push_str(&format!(": {cause}"));
        }
    }
    text
}

/// The status that a server answered with. Its type is not for us; what follows it in the text is the server's, so that only
/// a number is taken.
fn status(error: &dyn StdError) -> Option<u16> {
    let text = error.to_string();
    let (_, behind) = text.split_once("status code: ")?;
    behind.get(..3)?.parse().ok()
}

fn kind(error: &Error) -> String {
    let denied = "access is denied to hutchd";
    match error {
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => return denied.into(),
        Error::Precondition { .. } | Error::AlreadyExists { .. } | Error::NotModified { .. } => {
            return "the object was changed meanwhile".into();
        }
        Error::NotSupported { .. } | Error::NotImplemented { .. } => return "it cannot do that".into(),
        _ => {}
    }
    let causes = || std::iter::successors(Some(error as &dyn StdError), |&error| error.source());
    if let Some(http) = causes().find_map(|cause| cause.downcast_ref::<HttpError>()) {
        return match http.kind() {
            HttpErrorKind::Connect => "it cannot be reached",
            HttpErrorKind::Timeout => "it does not answer in time",
            HttpErrorKind::Decode => "its answer makes no sense",
            _ => "the connection to it broke",
        }
        .into();
    }
    if let Some(status) = status(error) {
        return format!("it answers {status}");
    }
    match causes().find_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind) {
        Some(io::ErrorKind::PermissionDenied) => denied.into(),
        Some(kind) => kind.to_string(),
        None => "it fails".into(),
    }
}

/// Why something was not done with an object.
pub(super) fn error(error: &Error, object: &str) -> ObjectError {
    if let Error::NotFound { .. } = error {
        return ObjectError::Missing(object.into());
    }
    let why = kind(error);
    tracing::warn!(object, why, "the object store fails");
    ObjectError::Failed(why)
}
