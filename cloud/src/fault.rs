//! Why a call is refused, in EC2's words.

use std::borrow::Cow;
use std::fmt;

/// An error as EC2 has it: a code that programs branch on, and a message for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The code, spelled as EC2 spells it.
    pub code: Cow<'static, str>,
    /// What was wrong, with which id, and what to do.
    pub message: String,
}

impl Fault {
    /// A fault.
    pub fn new(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Fault {
        Fault { code: code.into(), message: message.into() }
    }

    /// `Invalid….NotFound` and its relatives for an id.
    pub fn not_found(kind: &'static str, what: &str, id: &str) -> Fault {
        Fault::new(format!("{kind}.NotFound"), format!("The {what} '{id}' does not exist"))
    }

    /// A parameter's value cannot be.
    pub fn value(parameter: &str, value: &str, why: &str) -> Fault {
        Fault::new(
            "InvalidParameterValue",
            format!("Value ({value}) for parameter {parameter} is invalid. {why}"),
        )
    }

    /// Parameters that do not go together.
    pub fn combination(why: impl Into<String>) -> Fault {
        Fault::new("InvalidParameterCombination", why)
    }

    /// A parameter that has to be there.
    pub fn missing(parameter: &str) -> Fault {
        Fault::new("MissingParameter", format!("The request must contain the parameter {parameter}"))
    }

    /// Ours to repair, not the caller's.
    pub fn internal(why: impl fmt::Display) -> Fault {
        Fault::new("InternalError", format!("An internal error has occurred: {why}"))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Fault {}

impl From<crate::store::StoreError> for Fault {
    fn from(error: crate::store::StoreError) -> Fault {
        Fault::internal(error)
    }
}

/// What a verb gives.
pub type Result<T> = std::result::Result<T, Fault>;
