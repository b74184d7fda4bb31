//! Calls: who may how often, who serves them, what is counted.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hutch_api::ec2::{self, Regions};
use hutch_api::query::{Backend, Call, Credential, Fault, Node};
use hutch_cloud::model::Instance;
use hutch_cloud::region::lifecycle::Policies;

use crate::keys::Keys;
use crate::owner::{self, Owner};

/// How many calls at once, and how many a second after that.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    burst: f64,
    refill: f64,
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        if text == "0" {
            return Ok(Rate { burst: 0.0, refill: 0.0 });
        }
        let numbers =
            text.split_once(':').and_then(|(a, b)| Some((a.parse::<u32>().ok()?, b.parse::<u32>().ok()?)));
        match numbers {
            Some((burst, refill)) if burst > 0 && refill > 0 => {
                Ok(Rate { burst: burst.into(), refill: refill.into() })
            }
            _ => Err("it is BURST:PER-SECOND, such as 100:20, or 0".into()),
        }
    }
}

/// What EC2 calls a token bucket: how many tokens were in it, and when.
type Buckets = HashMap<(String, String, String), (f64, Instant)>;

/// What serves the calls.
pub struct Service {
    regions: Regions,
    keys: Keys,
    owner: Owner,
    policies: Policies,
    looking: Mutex<()>,
    rate: Rate,
    buckets: Mutex<Buckets>,
    counts: Mutex<BTreeMap<(String, String), (u64, f64)>>,
}

impl Service {
    /// A service of these regions.
    pub fn new(regions: Regions, keys: Keys, owner: Owner, policies: Policies, rate: Rate) -> Service {
        Service {
            regions,
            keys,
            owner,
            policies,
            looking: Mutex::default(),
            rate,
            buckets: Mutex::default(),
            counts: Mutex::default(),
        }
    }

    /// Ends what goes on beside calls.
    pub fn end(&self) {
        self.owner.end();
    }

    /// What is done from time to time.
    pub fn look_after(&self) {
        // One at a time: what is due is taken once.
        let Ok(_one) = self.looking.try_lock() else { return };
        for (name, region) in &self.regions {
            let done = region.adopt_templates().and_then(|_| region.forget_tokens());
            let done = done
                .and_then(|()| region.forget_imports())
                .and_then(|()| region.forget_stored())
                .and_then(|()| region.forget_bundles());
            let now = jiff::Timestamp::now();
            if let Err(error) = done.and_then(|()| region.follow(&self.policies, now)) {
                tracing::warn!(region = name, %error, "not looked after");
            }
        }
        // A bucket that is full again need not be kept.
        let full = Duration::from_secs_f64(self.rate.burst / self.rate.refill.max(1.0));
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.retain(|_, (_, at)| at.elapsed() < full);
    }
}

fn is_served(action: &str) -> bool {
    action == "GetCallerIdentity"
        || owner::ACTIONS.contains(&action)
        || ec2::served().any(|name| name == action)
}

impl Backend for Service {
    fn credential(&self, access_key: &str) -> Option<Credential> {
        self.keys.credential(access_key)
    }

    fn admit(&self, account: &str, region: &str, action: &str) -> bool {
        if self.rate.burst == 0.0 {
            return true;
        }
        // A stranger's names must not make us remember any number of them.
        let region = if self.regions.contains_key(region) { region } else { "other" };
        let action = if is_served(action) { action } else { "other" };
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (account.to_owned(), region.to_owned(), action.to_owned());
        let now = Instant::now();
        let (tokens, at) = buckets.entry(key).or_insert((self.rate.burst, now));
        *tokens = (*tokens + now.duration_since(*at).as_secs_f64() * self.rate.refill).min(self.rate.burst);
        *at = now;
        let admitted = *tokens >= 1.0;
        if admitted {
            *tokens -= 1.0;
        }
        admitted
    }

    fn call(&self, call: &Call) -> Result<Node, Fault> {
        match call.service.as_str() {
            owner::SERVICE => self.owner.serve(&self.regions, call),
            _ => ec2::serve(&self.regions, call),
        }
    }

    fn note(&self, action: &str, code: Option<&str>, took: Duration) {
        // Likewise, only names that are served are counted by name.
        let known = is_served(action);
        let key = (
            if known { action } else { "other" }.to_owned(),
            code.filter(|_| known).unwrap_or("").to_owned(),
        );
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, seconds) = counts.entry(key).or_default();
        *count += 1;
        *seconds += took.as_secs_f64();
    }

    fn metrics(&self) -> String {
        let mut text = String::from(
            "# HELP hutch_calls_total Calls that were answered.\n# TYPE hutch_calls_total counter\n",
        );
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // A String takes all that is written to it.
        for ((action, code), (count, _)) in &counts {
            let _ = writeln!(text, "hutch_calls_total{{action=\"{action}\",code=\"{code}\"}} {count}");
        }
        text.push_str(
            "# HELP hutch_call_seconds_total How long they took.\n# TYPE hutch_call_seconds_total counter\n",
        );
        for ((action, code), (_, seconds)) in &counts {
            let _ = writeln!(
                text,
                "hutch_call_seconds_total{{action=\"{action}\",code=\"{code}\"}} {seconds:.6}"
            );
        }
        text.push_str("# HELP hutch_instances Instances by state.\n# TYPE hutch_instances gauge\n");
        for (name, region) in &self.regions {
            let mut states: BTreeMap<&str, u64> = BTreeMap::new();
            for instance in region.all::<Instance>().unwrap_or_default() {
                *states.entry(instance.state.name()).or_default() += 1;
            }
            for (state, count) in states {
                let _ = writeln!(text, "hutch_instances{{region=\"{name}\",state=\"{state}\"}} {count}");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strangers_names_fill_no_memory() {
        let key = "AKID:secret".parse().unwrap();
        let (keys, owner) = (Keys::open(None, Some(key)).unwrap(), Owner::new(None, "1"));
        let service = Service::new(Regions::new(), keys, owner, Policies::new(), "2:1".parse().unwrap());
        let admitted = (0..1000).filter(|n| service.admit("1", &format!("r{n}"), &format!("A{n}"))).count();
        assert!(admitted < 100, "{admitted} calls of one account, each of another name");
        assert!(service.admit("1", "r", "RunInstances"), "what is served has a bucket of its own");
        assert_eq!(service.buckets.lock().unwrap().len(), 2);
    }
}
