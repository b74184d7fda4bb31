//! Key pairs.

use hutch_cloud::model::KeyPair;
use hutch_cloud::region::Algorithm;

use super::{Answer, Context, Operation, tag_set, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("CreateKeyPair", create),
    ("ImportKeyPair", import),
    ("DescribeKeyPairs", describe),
    ("DeleteKeyPair", delete),
];

fn tags(c: &Context<'_>) -> Result<std::collections::BTreeMap<String, String>, Fault> {
    Ok(c.tag_specifications()?.remove("key-pair").unwrap_or_default())
}

fn told(key: &KeyPair) -> Node {
    node! {
        "keyPairId": &key.key_id,
        "keyName": &key.name,
        "keyFingerprint": &key.fingerprint,
        "tagSet": tag_set(&key.tags),
    }
}

fn create(c: &Context<'_>) -> Answer {
    let algorithm = match c.params.str("KeyType").unwrap_or("rsa") {
        "rsa" => Algorithm::Rsa,
        "ed25519" => Algorithm::Ed25519,
        other => return Err(Fault::value("KeyType", other, "It is rsa or ed25519.")),
    };
    if let Some(format) = c.params.str("KeyFormat").filter(|format| *format != "pem") {
        return Err(Fault::value("KeyFormat", format, "hutch writes pem."));
    }
    let made = c.region.create_key(c.account, c.params.required("KeyName")?, algorithm, &tags(c)?)?;
    Ok(told(&made.pair).with("keyMaterial", made.material))
}

fn import(c: &Context<'_>) -> Answer {
    let name = c.params.required("KeyName")?;
    let material = c.params.blob("PublicKeyMaterial")?.ok_or_else(|| Fault::missing("PublicKeyMaterial"))?;
    Ok(told(&c.region.import_key(c.account, name, &material, &tags(c)?)?))
}

fn describe(c: &Context<'_>) -> Answer {
    let mut keys = c.region.all_of::<KeyPair>(&format!("{}/", c.account))?;
    let (names, ids) = (c.ids("KeyName"), c.ids("KeyPairId"));
    for name in &names {
        if !keys.iter().any(|key| key.name == *name) {
            return Err(Fault::not_found("InvalidKeyPair", "key pair", name));
        }
    }
    for id in &ids {
        if !keys.iter().any(|key| key.key_id == *id) {
            return Err(Fault::not_found("InvalidKeyPair", "key pair", id));
        }
    }
    let all = names.is_empty() && ids.is_empty();
    keys.retain(|key| all || names.contains(&key.name) || ids.contains(&key.key_id));
    let with_key = c.params.boolean("IncludePublicKey")?.unwrap_or(false);
    let keys = keys.iter().map(|key| {
        let node = told(key).with("keyType", &key.kind).with("createTime", time(key.created));
        (key.name.clone(), node.with("publicKey", with_key.then_some(&key.public)))
    });
    c.describe("keySet", keys.collect(), &[])
}

fn delete(c: &Context<'_>) -> Answer {
    let name = match (c.params.str("KeyName"), c.params.str("KeyPairId")) {
        (Some(name), _) => name.to_owned(),
        (None, Some(id)) => {
            let keys = c.region.all_of::<KeyPair>(&format!("{}/", c.account))?;
            let key = keys.into_iter().find(|key| key.key_id == id);
            key.ok_or_else(|| Fault::not_found("InvalidKeyPair", "key pair", id))?.name
        }
        (None, None) => return Err(Fault::missing("KeyName")),
    };
    let gone = c.region.delete_key(c.account, &name)?;
    Ok(node! { "return": true, "keyPairId": gone.map(|key| key.key_id) })
}
