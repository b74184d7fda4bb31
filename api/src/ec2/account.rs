//! What an account sets for itself in a region.

use hutch_cloud::region::{AccountSettings, MetadataDefaults};

use super::{Answer, Context, Operation, done};
use crate::node;
use crate::query::{Fault, Node, Params};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("GetInstanceMetadataDefaults", metadata_defaults),
    ("ModifyInstanceMetadataDefaults", modify_metadata_defaults),
    ("GetImageBlockPublicAccessState", public_images),
    ("EnableImageBlockPublicAccess", block_public_images),
    ("DisableImageBlockPublicAccess", unblock_public_images),
    ("GetEbsEncryptionByDefault", |c| encrypts(c, None)),
    ("EnableEbsEncryptionByDefault", |c| encrypts(c, Some(true))),
    ("DisableEbsEncryptionByDefault", |c| encrypts(c, Some(false))),
    ("GetEbsDefaultKmsKeyId", default_key),
    ("ModifyEbsDefaultKmsKeyId", modify_default_key),
    ("ResetEbsDefaultKmsKeyId", reset_default_key),
];

/// Whether new volumes are encrypted, or whether they are to be from now on.
fn encrypts(c: &Context<'_>, set: Option<bool>) -> Answer {
    let settings = match set {
        Some(set) => c.region.modify_account_settings(c.account, |settings| settings.encrypt = set)?,
        None => c.region.account_settings(c.account)?,
    };
    let kind = set.is_none().then_some(if settings.encrypt { "sse-kms" } else { "none" });
    Ok(node! { "ebsEncryptionByDefault": settings.encrypt, "sseType": kind })
}

fn default_key(c: &Context<'_>) -> Answer {
    key_told(c, &c.region.account_settings(c.account)?)
}

fn key_told(c: &Context<'_>, settings: &AccountSettings) -> Answer {
    Ok(node! { "kmsKeyId": c.region.key_arn(c.account, &c.region.default_key(settings)?) })
}

fn modify_default_key(c: &Context<'_>) -> Answer {
    let key = c.region.key(c.params.required("KmsKeyId")?)?;
    let set = |settings: &mut AccountSettings| settings.default_key = Some(key.clone());
    key_told(c, &c.region.modify_account_settings(c.account, set)?)
}

fn reset_default_key(c: &Context<'_>) -> Answer {
    key_told(c, &c.region.modify_account_settings(c.account, |settings| settings.default_key = None)?)
}

const BLOCKED: &str = "block-new-sharing";
const UNBLOCKED: &str = "unblocked";

fn metadata_defaults(c: &Context<'_>) -> Answer {
    let set = c.region.account_settings(c.account)?.metadata;
    let switch =
        |on: Option<bool>, yes: &'static str, no: &'static str| on.map(|on| if on { yes } else { no });
    let any = set != MetadataDefaults::default();
    let level = node! {
        "httpTokens": switch(set.tokens_required, "required", "optional"),
        "httpPutResponseHopLimit": set.hop_limit,
        "httpEndpoint": switch(set.enabled, "enabled", "disabled"),
        "instanceMetadataTags": switch(set.tags, "enabled", "disabled"),
        "managedBy": any.then_some("account"),
    };
    Ok(node! { "accountLevel": level })
}

/// The preferences that are asked for, over those that are.
fn set_defaults(p: &Params, set: &mut MetadataDefaults) -> Result<(), Fault> {
    let switch = |name: &str, yes: &str, no: &str, have: Option<bool>| match p.str(name) {
        None => Ok(have),
        Some("no-preference") => Ok(None),
        Some(text) if text == yes => Ok(Some(true)),
        Some(text) if text == no => Ok(Some(false)),
        Some(text) => Err(Fault::value(name, text, &format!("It is {yes}, {no} or no-preference."))),
    };
    set.tokens_required = switch("HttpTokens", "required", "optional", set.tokens_required)?;
    set.enabled = switch("HttpEndpoint", "enabled", "disabled", set.enabled)?;
    set.tags = switch("InstanceMetadataTags", "enabled", "disabled", set.tags)?;
    if let Some(hops) = p.int("HttpPutResponseHopLimit")? {
        let why = "It is a number from 1 to 64, or -1: no preference.";
        let bad = || Fault::value("HttpPutResponseHopLimit", &hops.to_string(), why);
        set.hop_limit = match hops {
            -1 => None,
            hops => Some(u8::try_from(hops).ok().filter(|n| (1..=64).contains(n)).ok_or_else(bad)?),
        };
    }
    Ok(())
}

fn modify_metadata_defaults(c: &Context<'_>) -> Answer {
    // What is wrong with it is said before anything is set.
    set_defaults(c.params, &mut MetadataDefaults::default())?;
    c.region.modify_account_settings(c.account, |settings| {
        let _ = set_defaults(c.params, &mut settings.metadata);
    })?;
    Ok(done())
}

fn told(blocked: bool) -> Node {
    node! { "imageBlockPublicAccessState": if blocked { BLOCKED } else { UNBLOCKED } }
}

fn public_images(c: &Context<'_>) -> Answer {
    let blocked = c.region.account_settings(c.account)?.block_public_images;
    Ok(told(blocked).with("managedBy", "account"))
}

fn block_public_images(c: &Context<'_>) -> Answer {
    let state = c.params.required("ImageBlockPublicAccessState")?;
    if state != BLOCKED {
        return Err(Fault::value("ImageBlockPublicAccessState", state, &format!("It is {BLOCKED}.")));
    }
    c.region.modify_account_settings(c.account, |settings| settings.block_public_images = true)?;
    Ok(told(true))
}

fn unblock_public_images(c: &Context<'_>) -> Answer {
    c.region.modify_account_settings(c.account, |settings| settings.block_public_images = false)?;
    Ok(told(false))
}
