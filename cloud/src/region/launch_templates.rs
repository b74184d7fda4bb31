//! Launch templates: requests to launch, kept under a name, in versions that never change.

use std::collections::BTreeMap;

use crate::fault::{Fault, Result};
use crate::id;
use crate::model::{LaunchTemplate, LaunchTemplateVersion, Name, Tags};

use super::{Region, Work, now, recall, remember, tags};

/// The most versions of a template that can be there at a time. EC2 has 10,000.
const MAX_VERSIONS: usize = 1_000;
/// The most bytes of a version: user data as they are sent, and room for all else.
const MAX_DATA: usize = 64 << 10;
/// The most bytes of a description.
const MAX_DESCRIPTION: usize = 255;

/// What of a request a template keeps: parameters by their flat names, such as `BlockDeviceMapping.1.DeviceName`.
pub type Data = BTreeMap<String, String>;

/// How a template is named: by id, or by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplateName<'a> {
    /// `lt-…`
    Id(&'a str),
    /// The account's own name for it.
    Name(&'a str),
}

/// A version that was to go, as it was named, and its number, or why it stays.
pub type Deleted = (String, Result<u64>);

/// What CreateLaunchTemplate asks for.
#[derive(Debug, Clone, Default)]
pub struct NewTemplate {
    /// Its name.
    pub name: String,
    /// What its first version is said to be.
    pub description: String,
    /// The first version.
    pub data: Data,
    /// Its tags.
    pub tags: Tags,
    /// What makes the call idempotent.
    pub client_token: Option<String>,
    /// A digest of the request.
    pub request: String,
}

fn missing() -> Fault {
    Fault::new(
        "InvalidLaunchTemplateName.NotFoundException",
        "At least one of the launch templates specified in the request does not exist.",
    )
}

fn no_version(version: &str, template: &str) -> Fault {
    let why =
        format!("Could not find the specified version {version} for the launch template with ID {template}.");
    Fault::new("InvalidLaunchTemplateId.VersionNotFound", why)
}

fn version_id(template: &str, version: u64) -> String {
    format!("{template}/{version:020}")
}

fn name_id(account: &str, name: &str) -> String {
    format!("launch-template/{account}/{name}")
}

fn check(description: &str, data: &Data) -> Result<()> {
    if description.len() > MAX_DESCRIPTION {
        let why = format!("A version's description has at most {MAX_DESCRIPTION} bytes.");
        return Err(Fault::value("versionDescription", "…", &why));
    }
    match data.iter().map(|(name, value)| name.len() + value.len()).sum() {
        0 => Err(Fault::missing("LaunchTemplateData")),
        1..=MAX_DATA => Ok(()),
        size => {
            let why = format!("A version has at most {MAX_DATA} bytes.");
            Err(Fault::value("LaunchTemplateData", &format!("{size} bytes"), &why))
        }
    }
}

fn own(work: &mut Work<'_>, account: &str, name: TemplateName<'_>) -> Result<LaunchTemplate> {
    match name {
        TemplateName::Id(id) => tags::own(work, account, id),
        TemplateName::Name(name) => {
            let of = work.get::<Name>(&name_id(account, name))?.ok_or_else(missing)?.of;
            work.get(&of)?.ok_or_else(missing)
        }
    }
}

impl LaunchTemplate {
    /// The number that a version is named by: `$Latest`, `$Default` (also without any), or digits.
    ///
    /// # Errors
    /// `InvalidLaunchTemplateId.VersionNotFound`.
    pub fn version(&self, name: Option<&str>) -> Result<u64> {
        match name.unwrap_or("$Default") {
            "$Default" => Ok(self.default_version),
            "$Latest" => Ok(self.latest_version),
            number => number.parse().map_err(|_| no_version(number, &self.id)),
        }
    }
}

impl Region {
    /// Makes a template, with its first version.
    ///
    /// # Errors
    /// `InvalidLaunchTemplateName.*`.
    pub fn create_launch_template(
        &self,
        account: &str,
        new: &NewTemplate,
    ) -> Result<(LaunchTemplate, LaunchTemplateVersion)> {
        let known = |c: char| c.is_ascii_alphanumeric() || "()./_-".contains(c);
        if !(3..=128).contains(&new.name.len()) || !new.name.chars().all(known) {
            let why = "A launch template's name has 3 to 128 characters: letters, digits and ( ) . / _ -";
            return Err(Fault::new("InvalidLaunchTemplateName.MalformedException", why));
        }
        check(&new.description, &new.data)?;
        tags::check(&new.tags)?;
        let token = new.client_token.as_ref().map(|token| format!("CreateLaunchTemplate/{account}/{token}"));
        self.transact(|work| {
            let made = recall(work, token.as_deref(), &new.request)?;
            if let Some(id) = made.and_then(|made| made.first().cloned()) {
                let template: LaunchTemplate = tags::own(work, account, &id)?;
                let first = work.get(&version_id(&id, 1))?.ok_or_else(|| no_version("1", &id))?;
                return Ok((template, first));
            }
            let name = name_id(account, &new.name);
            if work.get::<Name>(&name)?.is_some() {
                let why = format!("Launch template name already in use: {}", new.name);
                return Err(Fault::new("InvalidLaunchTemplateName.AlreadyExistsException", why));
            }
            let template = LaunchTemplate {
                id: id::new("lt"),
                account: account.into(),
                name: new.name.clone(),
                created: now(),
                default_version: 1,
                latest_version: 1,
                tags: new.tags.clone(),
            };
            let first = LaunchTemplateVersion {
                id: version_id(&template.id, 1),
                version: 1,
                created: template.created,
                description: new.description.clone(),
                data: new.data.clone(),
            };
            work.put(&Name { id: name, of: template.id.clone() })?;
            work.put(&template)?;
            work.put(&first)?;
            remember(work, token.as_deref(), &new.request, vec![template.id.clone()])?;
            Ok((template, first))
        })
    }

    /// Adds a version. `merge` makes its data of those of the source version, if one is named, which may be `$Latest` or
    /// `$Default`.
    ///
    /// # Errors
    /// The template's or the version's are not there.
    pub fn create_launch_template_version(
        &self,
        account: &str,
        name: TemplateName<'_>,
        source: Option<&str>,
        description: &str,
        merge: impl Fn(Data) -> Data,
    ) -> Result<(LaunchTemplate, LaunchTemplateVersion)> {
        self.transact(|work| {
            let mut template = own(work, account, name)?;
            let before = match source {
                Some(version) => version_of(work, &template, template.version(Some(version))?)?.data,
                None => Data::new(),
            };
            let data = merge(before);
            check(description, &data)?;
            let have = work.all::<LaunchTemplateVersion>(&format!("{}/", template.id))?.len();
            if have >= MAX_VERSIONS {
                let why = format!("The launch template {} has {have} versions; delete some", template.id);
                return Err(Fault::new("VersionLimitExceeded", why));
            }
            template.latest_version += 1;
            let version = LaunchTemplateVersion {
                id: version_id(&template.id, template.latest_version),
                version: template.latest_version,
                created: now(),
                description: description.into(),
                data,
            };
            work.put(&template)?;
            work.put(&version)?;
            Ok((template, version))
        })
    }

    /// Has another version be the default one.
    ///
    /// # Errors
    /// The template or the version are not there.
    pub fn set_default_version(
        &self,
        account: &str,
        name: TemplateName<'_>,
        version: &str,
    ) -> Result<LaunchTemplate> {
        self.transact(|work| {
            let mut template = own(work, account, name)?;
            let version = template.version(Some(version))?;
            template.default_version = version_of(work, &template, version)?.version;
            work.put(&template)?;
            Ok(template)
        })
    }

    /// Removes a template with all its versions; instances of it stay.
    ///
    /// # Errors
    /// It is not there.
    pub fn delete_launch_template(&self, account: &str, name: TemplateName<'_>) -> Result<LaunchTemplate> {
        self.transact_alone(|work| {
            let template = own(work, account, name)?;
            for version in work.all::<LaunchTemplateVersion>(&format!("{}/", template.id))? {
                work.delete::<LaunchTemplateVersion>(&version.id);
            }
            work.delete::<Name>(&name_id(account, &template.name));
            work.delete::<LaunchTemplate>(&template.id);
            Ok(template)
        })
    }

    /// Removes versions of a template. Says of each whether it is gone, or why not: the default one stays.
    ///
    /// # Errors
    /// The template is not there.
    pub fn delete_launch_template_versions(
        &self,
        account: &str,
        name: TemplateName<'_>,
        versions: &[String],
    ) -> Result<(LaunchTemplate, Vec<Deleted>)> {
        self.transact(|work| {
            let template = own(work, account, name)?;
            let mut done = Vec::new();
            for asked in versions {
                let gone = template.version(Some(asked)).and_then(|n| version_of(work, &template, n));
                let gone = match gone {
                    Ok(found) if found.version == template.default_version => {
                        let why =
                            format!("Version {asked} is the default one; make another the default first");
                        Err(Fault::new("unexpectedError", why))
                    }
                    Ok(found) => {
                        work.delete::<LaunchTemplateVersion>(&found.id);
                        Ok(found.version)
                    }
                    Err(fault) => Err(Fault::new("launchTemplateVersionDoesNotExist", fault.message)),
                };
                done.push((asked.clone(), gone));
            }
            Ok((template, done))
        })
    }

    /// A template.
    ///
    /// # Errors
    /// It is not there.
    pub fn launch_template(&self, account: &str, name: TemplateName<'_>) -> Result<LaunchTemplate> {
        self.transact(|work| own(work, account, name))
    }

    /// One version of a template, as [`LaunchTemplate::version`] names it.
    ///
    /// # Errors
    /// The template or the version are not there.
    pub fn launch_template_version(
        &self,
        account: &str,
        name: TemplateName<'_>,
        version: Option<&str>,
    ) -> Result<(LaunchTemplate, LaunchTemplateVersion)> {
        self.transact(|work| {
            let template = own(work, account, name)?;
            let version = version_of(work, &template, template.version(version)?)?;
            Ok((template, version))
        })
    }
}

fn version_of(work: &mut Work<'_>, template: &LaunchTemplate, version: u64) -> Result<LaunchTemplateVersion> {
    let found = work.get(&version_id(&template.id, version))?;
    found.ok_or_else(|| no_version(&version.to_string(), &template.id))
}
