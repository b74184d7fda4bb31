//! What a machine of `hutch boot` is told of itself at 169.254.169.254: a service in this process, as long as the machine.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, RwLock};

use anyhow::{Context, bail};
use hutch_api::imds::{self, Document, Metadata, Secret};
use hutch_netfw::GuestNet;
use hutch_netfw::guest::SUBNET;
use tokio::runtime::{Builder, Runtime};

use crate::{image, ssh};

/// EC2's limit, in bytes.
const USER_DATA_MAX: u64 = 16 << 10;

/// Where a machine without a daemon is, in EC2's terms.
const REGION: &str = "home-1";
const ZONE: &str = "home-1a";
/// The default VPC.
const VPC: &str = "172.31.0.0/16";

/// What can be said of a machine before it has a network.
pub fn describe(
    image: Option<&Path>,
    instance_type: &str,
    key: Option<&Path>,
    user_data: Option<&Path>,
) -> anyhow::Result<Metadata> {
    Ok(Metadata {
        ami_id: image.and_then(image::id).unwrap_or_default(),
        availability_zone: ZONE.into(),
        instance_type: instance_type.into(),
        life_cycle: "on-demand".into(),
        pending_time: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        // Without an image there is nobody to log in.
        public_keys: image
            .map(|_| Ok::<_, anyhow::Error>(("hutch".into(), ssh::public_key(key)?)))
            .into_iter()
            .collect::<Result<_, _>>()?,
        region: REGION.into(),
        user_data: user_data.map(read_user_data).transpose()?,
        ..Metadata::default()
    })
}

/// A service that runs; dropping it ends it.
pub struct Service {
    _runtime: Runtime,
}

impl Service {
    /// Answers the guest of `net` from now on.
    pub fn start(net: &mut GuestNet, mut metadata: Metadata) -> anyhow::Result<Service> {
        let listeners = net.take_metadata_listeners();
        let [a, b, c, d] = net.ip.octets();
        metadata.hostname = format!("ip-{a}-{b}-{c}-{d}.{REGION}.internal");
        metadata.local_ipv4 = Some(net.ip);
        metadata.mac = net.mac.to_string();
        metadata.subnet_cidr = SUBNET.to_string();
        metadata.vpc_cidr = VPC.into();
        let runtime =
            Builder::new_multi_thread().worker_threads(1).thread_name("metadata").enable_all().build()?;
        let document = Arc::new(RwLock::new(Arc::new(Document::from(&metadata))));
        let secret = Secret::random();
        for listener in listeners {
            let (document, secret) = (document.clone(), secret.clone());
            runtime.spawn(async move {
                if let Err(e) = imds::serve(listener, document, secret).await {
                    eprintln!("hutch: the metadata service has ended: {e}");
                }
            });
        }
        Ok(Service { _runtime: runtime })
    }
}

/// Reads what `--user-data` names.
fn read_user_data(path: &Path) -> anyhow::Result<Vec<u8>> {
    let what = || format!("cannot read the user data {}", path.display());
    let mut data = Vec::new();
    File::open(path)
        .and_then(|file| file.take(USER_DATA_MAX + 1).read_to_end(&mut data))
        .with_context(what)?;
    if data.len() as u64 > USER_DATA_MAX {
        bail!(
            "the user data {} have more than {USER_DATA_MAX} bytes, EC2's limit; compress them, or fetch the rest from the guest",
            path.display()
        );
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_are_limited_as_in_ec2() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        for (len, good) in [(16 << 10, true), ((16 << 10) + 1, false)] {
            std::fs::write(&path, vec![b'x'; len]).unwrap();
            assert_eq!(read_user_data(&path).is_ok(), good, "{len}");
        }
        assert!(read_user_data(&dir.path().join("none")).is_err());
    }
}
