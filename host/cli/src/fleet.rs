//! Owns `dim fleet`: the subcommands for the members of a fleet. The admin key stays where the command runs; the host gets
//! signed rosters only.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::{Args, Subcommand};
use dim_age::x25519::Recipient;
use dim_api::MemberLog;
use dim_ipfs::ipns_record::Record;
use dim_model::ident::{GroupName, IpnsName, MemberLabel, Topic};
use dim_model::time::{Timestamp, nanoseconds};
use dim_topics::bundle::Listed;
use dim_topics::identity::{Digest, Incarnation, WriterId};
use dim_topics::membership::roster::{Group, MAX_CUTS, MemberRow, Roster, SignedRoster};
use ed25519_dalek::SigningKey;
use rand::Rng as _;
use reqwest::Method;
use serde_json::Value;
use zeroize::Zeroizing;

use crate::client::Client;
use crate::output::{Column, Output, Watch, line, note};
use crate::plugin::asks;

/// The time for which readers may cache the record of the fleet's name.
const RECORD_TTL: Duration = Duration::from_secs(300);

/// The first word of the file of an admin key. The private key follows in hex.
const KEY_FORM: &str = "dim-fleet-admin-key-1";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the admin key of a new fleet, and print the name of the fleet
    ///
    /// Each host joins the fleet with dim fleet join. The key decides about the members: keep it away from the hosts, and
    /// keep a copy of it. Example: dim fleet init lab
    Init {
        /// Name of the file, without its ending .fleet-key
        name: String,
        /// File for the key [default: NAME.fleet-key]
        #[arg(long, value_name = "FILE")]
        admin_key: Option<PathBuf>,
    },
    /// Let the host join a fleet, and print its keys in one line for dim fleet add
    ///
    /// The host needs no restart. Its reliable topics are those of the fleet from now on. Example: dim fleet join k51…
    Join {
        /// Name of the fleet, k51…
        fleet: IpnsName,
        /// Leave the fleet with a roster to which the host belongs
        #[arg(long, conflicts_with = "agent_dir")]
        leave: bool,
        /// Directory of an agent: print the keys of the agent instead. Its config must name the fleet
        #[arg(long, value_name = "DIR")]
        agent_dir: Option<PathBuf>,
    },
    /// Add a member, or change its groups
    ///
    /// Without a roster on the host, --first makes the first one. Example: dim fleet add --name node-7 --keeper LINE
    Add {
        /// Line that dim fleet join has printed
        line: MemberLine,
        /// Name of the member
        #[arg(long, value_name = "NAME")]
        name: MemberLabel,
        /// Group of the member; can be repeated [default: as before, and all for a new member]
        #[arg(long, value_name = "GROUP")]
        group: Vec<GroupName>,
        /// Let the member issue keys
        #[arg(long)]
        keeper: bool,
        /// Let the member issue no keys any more
        #[arg(long, conflicts_with = "keeper")]
        no_keeper: bool,
        /// Let new members of new groups read earlier events
        #[arg(long)]
        history: bool,
        /// Add a former member again: everything that it wrote meanwhile counts
        #[arg(long)]
        readmit: bool,
        /// Make the first roster of the fleet
        #[arg(long)]
        first: bool,
        #[command(flatten)]
        change: Change,
    },
    /// Remove a member; its groups get new keys
    ///
    /// Events of the member count as far as the host has received them.
    Remove {
        /// Name of the member, or the IPNS name of its key
        member: String,
        /// Allow that a group has no keeper any more
        #[arg(long)]
        without_keeper: bool,
        #[command(flatten)]
        change: Change,
    },
    /// Require new keys for the groups of a member, or for all groups
    Rekey {
        /// Name of the member, or the IPNS name of its key
        #[arg(required_unless_present = "all")]
        member: Option<String>,
        /// All groups
        #[arg(long, conflicts_with = "member")]
        all: bool,
        #[command(flatten)]
        change: Change,
    },
    /// Publish the roster again with a later expiry
    Renew {
        #[command(flatten)]
        change: Change,
    },
    /// List, add or remove admins
    #[command(subcommand)]
    Admin(Admin),
    /// Add a signature to a draft of a roster; the last one publishes it
    ///
    /// The differences from the current roster are shown. Example: dim fleet sign roster-7.draft
    Sign {
        /// Draft that another admin has made
        draft: PathBuf,
        /// File of the admin key
        #[arg(long, value_name = "FILE", env = "DIM_FLEET_KEY")]
        admin_key: PathBuf,
        /// Sign without a question
        #[arg(long)]
        yes: bool,
    },
    /// Let the IPNS name of the fleet point to the current roster
    ///
    /// Only the key of the first admin can sign for the name. The other commands do it if they have this key.
    PublishName {
        /// File of the key of the first admin
        #[arg(long, value_name = "FILE", env = "DIM_FLEET_KEY")]
        admin_key: PathBuf,
    },
    /// List the members, when each was heard, and the roster and keys that it has
    Ls {
        #[command(flatten)]
        watch: Watch,
    },
}

/// The subcommands for the admins of a fleet.
#[derive(Debug, Subcommand)]
pub enum Admin {
    /// Make the key of a new admin, and print the name of the key for dim fleet admin add
    Key {
        /// Name of the file, without its ending .fleet-key
        name: String,
        /// File for the key [default: NAME.fleet-key]
        #[arg(long, value_name = "FILE")]
        admin_key: Option<PathBuf>,
    },
    /// Add an admin
    ///
    /// The current admins and the new ones must sign. Example: dim fleet admin add k51… --threshold 2
    Add {
        /// Name of the key of the new admin, k51…
        admin: IpnsName,
        /// Number of admins that must sign each roster from now on [default: as before]
        #[arg(long, value_name = "NUMBER")]
        threshold: Option<u32>,
        #[command(flatten)]
        change: Change,
    },
    /// Remove an admin
    Remove {
        /// Name of the key of the admin, k51…
        admin: IpnsName,
        /// Number of admins that must sign each roster from now on [default: as before]
        #[arg(long, value_name = "NUMBER")]
        threshold: Option<u32>,
        #[command(flatten)]
        change: Change,
    },
    /// List the admins
    Ls,
}

/// The options of a change of the roster.
#[derive(Debug, Args)]
pub struct Change {
    /// File of the admin key; can be repeated if several admins must sign
    #[arg(long, value_name = "FILE", env = "DIM_FLEET_KEY", required = true)]
    admin_key: Vec<PathBuf>,
    /// File for the draft if signatures of other admins are missing [default: roster-VERSION.draft]
    #[arg(long, value_name = "FILE")]
    draft: Option<PathBuf>,
    /// Time after which members write no encrypted topics, unless the roster is renewed
    #[arg(long, value_name = "TIME", default_value = "90d", value_parser = dim_model::time::duration_of)]
    valid: Duration,
}

/// The keys of a host: the IPNS name of its key and its X25519 key.
#[derive(Clone, Debug)]
pub struct MemberLine {
    writer: WriterId,
    sealing: Recipient,
}

impl std::str::FromStr for MemberLine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = "it is no line that `dim fleet join` prints";
        let (writer, sealing) = text.trim().split_once(':').ok_or(form)?;
        let writer: IpnsName = writer.parse().map_err(|error| format!("{form}: {error}"))?;
        let writer = WriterId::of_name(&writer).ok_or("the key of the host is no Ed25519 key")?;
        let sealing = sealing.parse().map_err(|error| format!("{form}: {error}"))?;
        Ok(Self { writer, sealing })
    }
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Init { name, admin_key } => make_admin(&name, admin_key, "fleet", out),
            Self::Join { fleet, leave, agent_dir } => {
                let joined = match agent_dir {
                    Some(dir) => serde_json::json!({ "line": dim_agent::keys_line(&dir)? }),
                    None => {
                        let request = serde_json::json!({ "fleet": fleet, "leave": leave });
                        client.send_json(Method::POST, &["fleet", "join"], &[], &request).await?
                    }
                };
                if joined["has_reliable_topics"] == false {
                    note(
                        "the host has no reliable topics: it only reads encrypted documents of the fleet, and encrypts those of the keys with `encrypt: true` in its config",
                    );
                }
                if out.is_json() {
                    return out.rows(&joined, &[]);
                }
                line(joined["line"].as_str().unwrap_or_default())
            }
            Self::Add { line, name, group, keeper, no_keeper, history, readmit, first, change } => {
                let groups = Some(group.into_iter().collect()).filter(|it: &BTreeSet<_>| !it.is_empty());
                let is_keeper = (keeper || no_keeper).then_some(keeper);
                let row = AddedMember { label: name, groups, is_keeper, history, readmit };
                change.make(client, out, first, async |roster| add(roster, &line, row)).await
            }
            Self::Remove { member, without_keeper, change } => {
                change
                    .make(client, out, false, async |roster| {
                        let (writer, before) = (find(roster, &member)?, without_keepers(roster));
                        let cuts = ends_of_logs(client, &writer).await?;
                        roster.remove(&writer, cuts);
                        match without_keepers(roster).difference(&before).next() {
                            Some(group) if !without_keeper => bail!(
                                "{member} is the last keeper of group {group}, so nobody would issue its keys and its topics would wait: add another keeper first, or repeat the command with --without-keeper"
                            ),
                            _ => Ok(()),
                        }
                    })
                    .await
            }
            Self::Rekey { member, change, .. } => {
                change
                    .make(client, out, false, async |roster| {
                        let groups = match &member {
                            Some(member) => roster.members[&find(roster, member)?].groups.clone(),
                            None => roster.groups.keys().cloned().collect(),
                        };
                        let version = roster.version;
                        let named = roster.groups.iter_mut().filter(|(name, _)| groups.contains(name));
                        named.for_each(|(_, group)| group.rekeyed = version);
                        Ok(())
                    })
                    .await
            }
            Self::Renew { change } => change.make(client, out, false, async |_| Ok(())).await,
            Self::Admin(admin) => admin.execute(client, out).await,
            Self::Sign { draft, admin_key, yes } => sign(client, out, &draft, &admin_key, yes).await,
            Self::PublishName { admin_key } => {
                let key = read_key(&admin_key)?;
                let (fleet, current) = current_roster(client).await?;
                let current = current.context("the host has no roster yet")?;
                if !is_first_admin(&key, &fleet) {
                    bail!("the key in {} is not that of the first admin of the fleet", admin_key.display());
                }
                put_name_record(client, &key, &current).await?;
                let (version, expires) = (current.roster.version, current.roster.expires);
                if out.is_json() {
                    let published = serde_json::json!({ "version": version, "expires": expires });
                    return out.rows(&published, &[]);
                }
                line(&format!("the name of the fleet points to roster {version} until {expires:.0}"))
            }
            Self::Ls { watch } => {
                const COLUMNS: [Column; 8] = [
                    Column::word("NAME", "/name"),
                    Column::word("ID", "/id"),
                    Column::text("GROUPS", "/groups"),
                    Column::word("KEEPER", "/is_keeper"),
                    Column::word("SINCE VERSION", "/since"),
                    Column::ago("HEARD", "/heard"),
                    Column::word("ROSTER", "/version"),
                    Column::text("KEYS", "/keys"),
                ];
                let noted = std::sync::Mutex::new(Vec::new());
                out.list(watch, &COLUMNS, async || {
                    let mut fleet = client.get(&["fleet"], &[]).await?;
                    let notes = notes_of(&fleet);
                    let before =
                        std::mem::replace(&mut *noted.lock().expect("nobody panics"), notes.clone());
                    notes.iter().filter(|it| !before.contains(it)).for_each(|it| note(it));
                    let mut members = fleet["members"].take();
                    if !out.is_json() {
                        members.as_array_mut().into_iter().flatten().for_each(name_keys);
                    }
                    Ok(members)
                })
                .await
            }
        }
    }
}

/// Adds the names of the keys of a member, for a table.
fn name_keys(member: &mut Value) {
    let epochs = member["epochs"].as_object().into_iter().flatten();
    let keys = epochs.map(|(group, epoch)| format!("{group} {}", epoch.as_str().unwrap_or_default()));
    member["keys"] = keys.collect::<Vec<_>>().join(", ").into();
}

/// The notes about what a table of the members does not show.
fn notes_of(fleet: &Value) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |text: String| notes.push(text);
    let expires = serde_json::from_value::<Timestamp>(fleet["expires"].clone());
    if let (Some(version), Ok(expires)) = (fleet["version"].as_u64(), expires) {
        note(format!("roster {version}, expires {expires:.0}"));
    }
    for problem in fleet["problems"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        note(format!("warning: {problem}"));
    }
    for refused in fleet["refused"].as_array().into_iter().flatten() {
        let (count, text) = (&refused["count"], refused["text"].as_str().unwrap_or_default());
        let writer = refused["writer"].as_str().unwrap_or_default();
        note(format!("refused since the host started: {count}, because {text}; the last one of {writer}"));
    }
    notes
}

impl Admin {
    async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        let (admin, threshold, change, is_added) = match self {
            Self::Key { name, admin_key } => return make_admin(&name, admin_key, "admin", out),
            Self::Ls => {
                let fleet = client.get(&["fleet"], &[]).await?;
                let admin =
                    |admin: &Value| serde_json::json!({ "id": admin, "threshold": fleet["threshold"] });
                let rows = fleet["admins"].as_array().into_iter().flatten().map(admin).collect();
                const COLUMNS: [Column; 2] =
                    [Column::word("ID", "/id"), Column::word("THRESHOLD", "/threshold")];
                return out.rows(&Value::Array(rows), &COLUMNS);
            }
            Self::Add { admin, threshold, change } => (admin, threshold, change, true),
            Self::Remove { admin, threshold, change } => (admin, threshold, change, false),
        };
        let key = WriterId::of_name(&admin).context("the key of an admin is an Ed25519 key")?;
        let change_admins = async |roster: &mut Roster| {
            let mut admins = roster.admins().clone();
            let is_changed = if is_added { admins.keys.insert(key) } else { admins.keys.remove(&key) };
            if !is_changed {
                bail!("{admin} is {} admin of the fleet", if is_added { "already an" } else { "no" });
            }
            admins.threshold = threshold.unwrap_or(admins.threshold);
            Ok(roster.appoint(admins)?)
        };
        change.make(client, out, false, change_admins).await
    }
}

/// Makes the key of an admin, and prints its name.
fn make_admin(name: &str, file: Option<PathBuf>, what: &str, out: &Output) -> anyhow::Result<()> {
    let file = file.unwrap_or_else(|| PathBuf::from(format!("{name}.fleet-key")));
    let key = make_key(&file)?;
    let id = WriterId::of(&key.verifying_key()).name();
    note(&format!("the admin key is in {}: keep it, and a copy of it", file.display()));
    if out.is_json() {
        return out.rows(&serde_json::json!({ what: id, "admin_key": file }), &[]);
    }
    line(id.as_str())
}

/// Adds a signature to a draft.
async fn sign(
    client: &Client,
    out: &Output,
    file: &Path,
    admin_key: &Path,
    agrees: bool,
) -> anyhow::Result<()> {
    let key = read_key(admin_key)?;
    let (fleet, current) = current_roster(client).await?;
    let current = current.context("the host has no roster yet")?;
    let cannot = || format!("cannot read the draft in {}", file.display());
    let block = Bytes::from(std::fs::read(file).with_context(cannot)?);
    let draft = SignedRoster::open_draft(&block, &fleet).with_context(cannot)?;
    let newest = current.roster.version;
    if draft.roster.version != newest + 1 || draft.digest_of(newest) != Some(current.digest) {
        bail!(
            "the draft is of version {}, and the roster of the host of version {newest}: make the change again",
            draft.roster.version
        );
    }
    let found = differences(&current.roster, &draft.roster);
    if agrees {
        found.iter().for_each(|difference| note(difference));
    } else {
        match asks(&found.join("\n"), "Sign it?")? {
            Some(true) => {}
            Some(false) => bail!("it is not signed"),
            None => bail!("the draft makes these changes; --yes signs it:\n{}", found.join("\n")),
        }
    }
    let draft = draft.approve(&key)?;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).truncate(true);
    if let Some(version) = publish(client, out, draft, (file, &options), &[key]).await? {
        keep_last_version(admin_key, &fleet, version);
    }
    Ok(())
}

/// The file beside an admin key with the version of the last roster that a host has taken from it.
fn last_version_file(admin_key: &Path) -> PathBuf {
    let mut name = admin_key.as_os_str().to_owned();
    name.push(".last");
    PathBuf::from(name)
}

/// Refuses to sign a second roster of one version: a host that has not received the first one yet would lead to two
/// rosters of which each host keeps another one.
fn check_last_version(admin_key: &Path, draft: &SignedRoster) -> anyhow::Result<()> {
    let file = last_version_file(admin_key);
    let text = match std::fs::read_to_string(&file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        text => text.with_context(|| format!("cannot read {}", file.display()))?,
    };
    let last =
        text.trim().rsplit_once(' ').and_then(|(fleet, last)| Some((fleet, last.parse::<u64>().ok()?)));
    let (fleet, last) =
        last.with_context(|| format!("{} has no name of a fleet and version", file.display()))?;
    let Roster { fleet: of, version, .. } = &draft.roster;
    if fleet == of && *version <= last {
        bail!(
            "a host has roster {last} of this admin key already, and the host of this command has not received it: try again later, or with the API of another host. If no host has that roster any more, remove {}",
            file.display()
        );
    }
    Ok(())
}

/// Notes that a host has taken a roster.
fn keep_last_version(admin_key: &Path, fleet: &str, version: u64) {
    let file = last_version_file(admin_key);
    if let Err(error) = std::fs::write(&file, format!("{fleet} {version}\n")) {
        note(&format!(
            "warning: cannot write {}, which prevents a second roster {version}: {error}",
            file.display()
        ));
    }
}

/// The differences between two rosters, for people.
fn differences(before: &Roster, after: &Roster) -> Vec<String> {
    let mut found = Vec::new();
    for (id, row) in &after.members {
        match before.members.get(id) {
            Some(earlier) if earlier == row => {}
            Some(earlier) => {
                let fields = changed_fields(earlier, row).join(", ");
                found.push(format!("it changes member {} ({id}): {fields}", row.label));
            }
            None => {
                let keeper = if row.is_keeper { ", a keeper" } else { "" };
                found.push(format!("it adds member {} ({id}) of {}{keeper}", row.label, names(&row.groups)));
            }
        }
    }
    for (id, row) in before.members.iter().filter(|(id, _)| !after.members.contains_key(*id)) {
        found.push(format!("it removes member {} ({id})", row.label));
    }
    for (id, row) in &after.removed {
        if before.removed.get(id).is_some_and(|earlier| earlier != row) {
            found.push(format!("it changes how much of the former member {id} counts"));
        }
    }
    for id in before.removed.keys().filter(|id| !after.removed.contains_key(*id)) {
        found.push(format!("it no longer lists the former member {id}"));
    }
    for (name, group) in &after.groups {
        let earlier = before.groups.get(name);
        if earlier.is_none_or(|earlier| earlier.rekeyed != group.rekeyed) {
            found.push(format!("it requires new keys for group {name}"));
        }
        if earlier.map_or(group.history, |earlier| earlier.history != group.history) {
            let gets = if group.history { "get" } else { "do not get" };
            found.push(format!("new members of group {name} {gets} earlier keys"));
        }
    }
    for name in before.groups.keys().filter(|name| !after.groups.contains_key(*name)) {
        found.push(format!("it removes group {name}"));
    }
    let (admins, new_admins) = (before.admins(), after.admins());
    let added = new_admins.keys.difference(&admins.keys).map(|id| format!("it adds admin {id}"));
    let removed = admins.keys.difference(&new_admins.keys).map(|id| format!("it removes admin {id}"));
    found.extend(added.chain(removed));
    if admins.threshold != new_admins.threshold {
        found.push(format!("{} admins must sign from now on", new_admins.threshold));
    }
    found.push(format!("it expires at {:.0}", after.expires));
    found
}

/// The fields of a member that differ.
fn changed_fields(before: &MemberRow, after: &MemberRow) -> Vec<String> {
    let keeper = if after.is_keeper { "it becomes a keeper" } else { "it is no keeper any more" };
    let fields = [
        (before.label != after.label, format!("its name was {}", before.label)),
        (before.sealing != after.sealing, "ANOTHER KEY DECRYPTS ITS SECRETS".to_owned()),
        (before.groups != after.groups, format!("its groups are {}", names(&after.groups))),
        (before.is_keeper != after.is_keeper, keeper.to_owned()),
        (before.peers != after.peers || before.addresses != after.addresses, "its daemons".to_owned()),
        (before.since != after.since, format!("it counts as a member since version {}", after.since)),
    ];
    fields.into_iter().filter(|(differs, _)| *differs).map(|(_, words)| words).collect()
}

fn names(groups: &BTreeSet<GroupName>) -> String {
    groups.iter().map(GroupName::as_str).collect::<Vec<_>>().join(", ")
}

/// Returns the name of the fleet of the host, and its roster if it has one.
async fn current_roster(client: &Client) -> anyhow::Result<(String, Option<SignedRoster>)> {
    let known = client.get(&["fleet"], &[]).await?;
    let fleet = known["name"].as_str().unwrap_or_default().to_owned();
    let current = match client.get_bytes(&["fleet", "roster"]).await {
        Ok(block) => Some(SignedRoster::open(&block, &fleet)?),
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error.into()),
    };
    Ok((fleet, current))
}

/// Gives a roster to the host if it has all signatures, else writes it into a file. Returns the version that the host has
/// taken.
async fn publish(
    client: &Client,
    out: &Output,
    draft: SignedRoster,
    (file, options): (&Path, &std::fs::OpenOptions),
    keys: &[SigningKey],
) -> anyhow::Result<Option<u64>> {
    let (version, block, awaited) = (draft.roster.version, draft.to_block(), draft.awaited());
    if !awaited.is_empty() {
        let written = options.open(file).and_then(|mut opened| opened.write_all(&block));
        written.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => anyhow::anyhow!(
                "{} exists: sign that draft first, or remove it, or give another file with --draft",
                file.display()
            ),
            _ => anyhow::Error::new(error).context(format!("cannot write {}", file.display())),
        })?;
        let ids: Vec<String> = awaited.iter().map(|id| id.name().to_string()).collect();
        if out.is_json() {
            let draft = serde_json::json!({ "version": version, "draft": file, "awaited": ids });
            out.rows(&draft, &[])?;
            return Ok(None);
        }
        line(&format!(
            "roster {version} needs more signatures: an admin of these runs `dim fleet sign {}`: {}",
            file.display(),
            ids.join(", ")
        ))?;
        return Ok(None);
    }
    let answer: Value = client.send_bytes(Method::PUT, &["fleet", "roster"], &[], block.to_vec()).await?;
    match keys.iter().find(|key| is_first_admin(key, &draft.roster.fleet)) {
        Some(key) => put_name_record(client, key, &draft).await?,
        None => note(
            "the IPNS name of the fleet still points to an earlier roster: the first admin runs `dim fleet publish-name`",
        ),
    }
    if out.is_json() {
        out.rows(&answer, &[])?;
    } else {
        line(&format!("roster {version} of the fleet is on its way to the members"))?;
    }
    Ok(Some(version))
}

/// Whether a key is that of the first admin, which is the key of the fleet's IPNS name.
fn is_first_admin(key: &SigningKey, fleet: &str) -> bool {
    WriterId::of(&key.verifying_key()).name().as_str() == fleet
}

/// Gives the host a record with which the IPNS name of the fleet points to a roster.
async fn put_name_record(client: &Client, key: &SigningKey, roster: &SignedRoster) -> anyhow::Result<()> {
    let (path, record) = (["fleet", "record"], name_record(key, roster));
    let _: Value = client.send_bytes(Method::PUT, &path, &[], record).await?;
    Ok(())
}

/// Signs the record with which the IPNS name of the fleet points to a roster.
fn name_record(key: &SigningKey, roster: &SignedRoster) -> Vec<u8> {
    let pair = dim_ipfs::keys::ed25519_pair(key.as_bytes());
    let path = format!("/ipfs/{}", Digest::of(&roster.to_block()));
    let path = path.parse().expect("a CID makes a path");
    Record::sign(&pair, &path, roster.roster.version, roster.roster.expires, RECORD_TTL).bytes
}

/// What the operator says of a member. An existing member keeps what is absent.
struct AddedMember {
    label: MemberLabel,
    groups: Option<BTreeSet<GroupName>>,
    is_keeper: Option<bool>,
    /// Whether new members of groups that are new read earlier events.
    history: bool,
    /// Whether a former member may come back.
    readmit: bool,
}

/// Adds or changes a member of a roster.
fn add(roster: &mut Roster, line: &MemberLine, added: AddedMember) -> anyhow::Result<()> {
    let AddedMember { label, groups, is_keeper, history, readmit } = added;
    let version = roster.version;
    let other = roster.members.iter().find(|(writer, row)| row.label == label && **writer != line.writer);
    if let Some((other, _)) = other {
        bail!("{label} is the name of another member, {other}: remove it first, or give another name");
    }
    if roster.removed.contains_key(&line.writer) && !readmit {
        bail!(
            "this host was removed before, and whoever has its key may have written since then: make a new host, or repeat the command with --readmit, which lets everything of the host count"
        );
    }
    let before = roster.members.get(&line.writer);
    let known: BTreeSet<GroupName> = before.map(|row| row.groups.clone()).unwrap_or_default();
    let all = || ["all".parse::<GroupName>().expect("a name")].into();
    let groups = groups.unwrap_or_else(|| before.map_or_else(all, |row| row.groups.clone()));
    let is_keeper = is_keeper.unwrap_or_else(|| before.is_some_and(|row| row.is_keeper));
    if history && let Some(name) = groups.iter().find(|name| roster.groups.contains_key(*name)) {
        bail!("group {name} exists: --history applies to new groups only");
    }
    let gets_no_history = |name: &GroupName| roster.groups.get(name).is_none_or(|group| !group.history);
    let since = match before {
        // Otherwise keepers would give it the earlier keys of the group.
        Some(row) if !groups.difference(&known).any(gets_no_history) => row.since,
        _ => version,
    };
    let is_other_key = before.is_some_and(|row| row.sealing != line.sealing);
    for name in groups.iter().filter(|_| is_other_key) {
        // The holder of the key before must not read what follows.
        roster.groups.entry(name.clone()).and_modify(|group| group.rekeyed = version);
    }
    for name in groups.symmetric_difference(&known) {
        let is_new = !roster.groups.contains_key(name);
        let group = roster.groups.entry(name.clone()).or_insert(Group { rekeyed: version, history });
        // Who joins a group without a history must not read what was written before, and who leaves one what follows.
        if is_new || !group.history || !groups.contains(name) {
            group.rekeyed = version;
        }
    }
    roster.removed.remove(&line.writer);
    let row = MemberRow {
        label,
        sealing: line.sealing,
        peers: BTreeSet::new(),
        addresses: Vec::new(),
        groups,
        is_keeper,
        since,
    };
    roster.members.insert(line.writer, row);
    for name in without_keepers(roster) {
        note(&format!("warning: no keeper belongs to group {name}: nobody issues its keys"));
    }
    Ok(())
}

/// The groups that have no keeper.
fn without_keepers(roster: &Roster) -> BTreeSet<GroupName> {
    let has_keeper =
        |name: &GroupName| roster.members.values().any(|row| row.is_keeper && row.groups.contains(name));
    roster.groups.keys().filter(|name| !has_keeper(name)).cloned().collect()
}

/// Returns the member with a name or an id.
fn find(roster: &Roster, member: &str) -> anyhow::Result<WriterId> {
    let is_meant = |(writer, row): &(&WriterId, &MemberRow)| {
        row.label.as_str() == member || writer.name().as_str() == member
    };
    let found = roster.members.iter().find(is_meant).map(|(writer, _)| *writer);
    found.with_context(|| format!("the fleet has no member {member}: `dim fleet ls` lists them"))
}

/// Returns the ends of the logs of a member that are durable at the host.
async fn ends_of_logs(
    client: &Client,
    writer: &WriterId,
) -> anyhow::Result<BTreeMap<(Topic, Incarnation), Listed>> {
    let logs = client.get(&["fleet", "members", writer.name().as_str(), "logs"], &[]).await?;
    let mut logs: Vec<MemberLog> = serde_json::from_value(logs)?;
    if let Some(surplus @ 1..) = logs.len().checked_sub(MAX_CUTS) {
        note(&format!(
            "warning: the member has {} logs (one for each topic and start of its process), and a roster lists {MAX_CUTS}: hosts that lack events of the oldest {surplus} get gaps for them",
            logs.len()
        ));
    }
    // The newest ones count.
    logs.sort_by_key(|log| std::cmp::Reverse(log.time));
    let end = |log: MemberLog| {
        let incarnation =
            u128::from_str_radix(&log.incarnation, 16).context("an incarnation is not in hex")?;
        let digest = Digest::of_text(&log.cid).context("the CID of a bundle is invalid")?;
        let last = Listed { first: log.first, count: log.count, time: Timestamp(log.time), digest };
        Ok(((log.topic, Incarnation(incarnation.to_be_bytes())), last))
    };
    logs.into_iter().take(MAX_CUTS).map(end).collect()
}

impl Change {
    /// Makes the next roster with a change, signs it, and gives it to the host.
    async fn make(
        &self,
        client: &Client,
        out: &Output,
        first: bool,
        change: impl AsyncFnOnce(&mut Roster) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let keys = self.admin_key.iter().map(|file| read_key(file)).collect::<anyhow::Result<Vec<_>>>()?;
        let expires = Timestamp(Timestamp::wall().0.saturating_add(nanoseconds(self.valid)));
        let (fleet, current) = current_roster(client).await?;
        let mut next = match (&current, first) {
            (Some(current), false) => current.next(),
            (None, true) => Roster::first(&keys[0], expires),
            (Some(_), true) => bail!("the host has a roster already: leave --first out"),
            (None, false) => bail!(
                "the host has no roster yet: ask a host that has one, or make the first one of the fleet with `dim fleet add --first`"
            ),
        };
        if next.fleet != fleet {
            bail!("this is not the admin key of the fleet {fleet} of the host, but that of {}", next.fleet);
        }
        next.expires = expires;
        change(&mut next).await?;
        let mut draft = next.draft()?;
        let mut unused: BTreeSet<&PathBuf> = self.admin_key.iter().collect();
        // New admins are appointed first, and then the roster is signed.
        for (key, file) in keys.iter().zip(&self.admin_key).chain(keys.iter().zip(&self.admin_key)) {
            if draft.awaited().contains(&WriterId::of(&key.verifying_key())) {
                draft = draft.approve(key)?;
                unused.remove(file);
            }
        }
        for file in &self.admin_key {
            check_last_version(file, &draft)?;
        }
        if let Some(file) = unused.first().filter(|_| !draft.awaited().is_empty()) {
            bail!("the key in {} is no admin key of the fleet {fleet}", file.display());
        }
        let file = format!("roster-{}.draft", draft.roster.version);
        let file = self.draft.clone().unwrap_or_else(|| PathBuf::from(file));
        // Another draft of this version may wait for signatures.
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true);
        let version = publish(client, out, draft, (&file, &options), &keys).await?;
        if let Some(version) = version {
            self.admin_key.iter().for_each(|file| keep_last_version(file, &fleet, version));
        }
        Ok(())
    }
}

/// Makes a key and its file, which only the owner can read.
fn make_key(file: &Path) -> anyhow::Result<SigningKey> {
    let mut secret = Zeroizing::new([0; 32]);
    rand::rng().fill_bytes(secret.as_mut_slice());
    let key = SigningKey::from_bytes(&secret);
    let hex: Zeroizing<String> = Zeroizing::new(secret.iter().map(|byte| format!("{byte:02x}")).collect());
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let cannot = || format!("cannot make the file {}", file.display());
    let mut opened = options.open(file).with_context(cannot)?;
    writeln!(opened, "{KEY_FORM} {}", hex.as_str()).with_context(cannot)?;
    opened.sync_all().with_context(cannot)?;
    Ok(key)
}

/// Reads the file of an admin key.
fn read_key(file: &Path) -> anyhow::Result<SigningKey> {
    let cannot = || format!("cannot read the admin key in {}", file.display());
    let text = Zeroizing::new(std::fs::read_to_string(file).with_context(cannot)?);
    let hex = text.trim().strip_prefix(KEY_FORM).map(str::trim).filter(|hex| hex.len() == 64);
    let byte = |index: usize| u8::from_str_radix(hex?.get(2 * index..2 * index + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..32).map(byte).collect();
    let bytes = Zeroizing::new(bytes.with_context(|| format!("{} is no admin key", file.display()))?);
    Ok(SigningKey::from_bytes(bytes.as_slice().try_into().expect("32 bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_admin_key_comes_back_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lab.fleet-key");
        let key = make_key(&file).unwrap();
        assert_eq!(read_key(&file).unwrap(), key);
        make_key(&file).expect_err("it is not replaced");
        std::fs::write(&file, "something").unwrap();
        read_key(&file).unwrap_err();
    }

    fn member(number: u8) -> MemberLine {
        let key = SigningKey::from_bytes(&[number; 32]);
        MemberLine { writer: WriterId::of(&key.verifying_key()), sealing: Recipient([number; 32]) }
    }

    fn added(label: &str, groups: &[&str], is_keeper: Option<bool>) -> AddedMember {
        let groups: BTreeSet<GroupName> = groups.iter().map(|name| name.parse().unwrap()).collect();
        let groups = Some(groups).filter(|groups| !groups.is_empty());
        AddedMember { label: label.parse().unwrap(), groups, is_keeper, history: false, readmit: false }
    }

    #[test]
    fn the_line_of_a_host_comes_back() {
        let it = member(3);
        let text = format!("{}:{}", it.writer, it.sealing);
        let again: MemberLine = text.parse().unwrap();
        assert_eq!((again.writer, again.sealing), (it.writer, it.sealing));
        for text in ["", "k51", &it.writer.to_string(), &format!("{}:age1", it.writer)] {
            text.parse::<MemberLine>().unwrap_err();
        }
    }

    #[test]
    fn a_draft_hides_no_difference() {
        let group = |name: &str| name.parse::<GroupName>().unwrap();
        let mut before = Roster::first(&SigningKey::from_bytes(&[9; 32]), Timestamp(1));
        add(&mut before, &member(1), added("a", &["x"], Some(true))).unwrap();
        let says = |change: &dyn Fn(&mut Roster), words: &str| {
            let mut after = before.clone();
            change(&mut after);
            let found = differences(&before, &after);
            assert!(found.iter().any(|line| line.contains(words)), "{words}: {found:?}");
            assert_eq!(found.len(), 2, "one line beside the expiry: {found:?}");
        };
        let id = member(1).writer;
        let row = move |change: fn(&mut MemberRow)| {
            move |roster: &mut Roster| change(roster.members.get_mut(&id).unwrap())
        };
        says(&row(|row| row.sealing = Recipient([7; 32])), "ANOTHER KEY");
        says(&row(|row| row.is_keeper = false), "no keeper any more");
        says(&row(|row| row.groups.clear()), "its groups are");
        says(&row(|row| row.label = "b".parse().unwrap()), "its name was a");
        says(&row(|row| row.since = 9), "since version 9");
        says(&row(|row| row.addresses.push("/ip4/192.0.2.1".to_owned())), "its daemons");
        says(&|roster| roster.groups.get_mut(&group("x")).unwrap().history = true, "get earlier keys");
        says(&|roster| roster.groups.get_mut(&group("x")).unwrap().rekeyed = 9, "requires new keys");
        says(&|roster| drop(roster.members.remove(&id)), "removes member a");
        says(&|roster| assert!(roster.groups.remove(&group("x")).is_some()), "removes group x");
    }

    #[test]
    fn groups_get_new_keys_when_their_members_change() {
        let group = |name: &str| name.parse::<GroupName>().unwrap();
        let mut roster = Roster::first(&SigningKey::from_bytes(&[9; 32]), Timestamp(1));
        add(&mut roster, &member(1), added("a", &["x", "y"], Some(true))).unwrap();
        let rekeyed = |roster: &Roster, name: &str| roster.groups[&group(name)].rekeyed;
        roster.version = 2;
        add(&mut roster, &member(2), added("b", &["x"], None)).unwrap();
        assert_eq!((rekeyed(&roster, "x"), rekeyed(&roster, "y")), (2, 1));
        roster.version = 3;
        add(&mut roster, &member(1), added("a", &["x"], None)).unwrap();
        assert_eq!((rekeyed(&roster, "x"), rekeyed(&roster, "y")), (2, 3));
        add(&mut roster, &member(3), added("a", &["x"], None)).unwrap_err();
        assert_eq!(find(&roster, "b").unwrap(), member(2).writer);
        find(&roster, "c").unwrap_err();
    }

    #[test]
    fn a_member_keeps_what_is_not_stated_and_gets_no_earlier_keys_of_a_group_that_it_joins() {
        let mut roster = Roster::first(&SigningKey::from_bytes(&[9; 32]), Timestamp(1));
        add(&mut roster, &member(1), added("a", &["x", "y"], Some(true))).unwrap();
        add(&mut roster, &member(2), added("b", &["x"], None)).unwrap();
        let row = |roster: &Roster, number: u8| roster.members[&member(number).writer].clone();
        let before = row(&roster, 1);
        roster.version = 5;
        add(&mut roster, &member(1), added("c", &[], None)).unwrap();
        assert_eq!(row(&roster, 1), MemberRow { label: "c".parse().unwrap(), ..before });
        add(&mut roster, &member(1), added("c", &[], Some(false))).unwrap();
        assert!(!row(&roster, 1).is_keeper);
        assert_eq!(row(&roster, 2).since, 1);
        add(&mut roster, &member(2), added("b", &["x", "y"], None)).unwrap();
        assert_eq!(row(&roster, 2).since, 5);
        // The holder of another X25519 key reads nothing that follows.
        roster.version = 6;
        let changed = MemberLine { sealing: Recipient([7; 32]), ..member(2) };
        add(&mut roster, &changed, added("b", &[], None)).unwrap();
        assert!(roster.groups.values().all(|group| group.rekeyed == 6), "{:?}", roster.groups);
        let history = AddedMember { history: true, ..added("b", &["x"], None) };
        add(&mut roster, &member(2), history).expect_err("the group exists");
    }

    #[test]
    fn an_admin_key_signs_no_second_roster_of_a_version() {
        let dir = tempfile::tempdir().unwrap();
        let (file, key) = (dir.path().join("lab.fleet-key"), SigningKey::from_bytes(&[9; 32]));
        let draft = |version: u64| {
            let mut roster = Roster::first(&key, Timestamp(1));
            roster.version = version;
            let mut draft = Roster::first(&key, Timestamp(1)).draft().unwrap();
            draft.roster = roster;
            draft
        };
        check_last_version(&file, &draft(1)).unwrap();
        keep_last_version(&file, &draft(1).roster.fleet, 7);
        check_last_version(&file, &draft(7)).unwrap_err();
        check_last_version(&file, &draft(8)).unwrap();
        keep_last_version(&file, "another fleet", 9);
        check_last_version(&file, &draft(7)).unwrap();
        std::fs::write(last_version_file(&file), "nonsense").unwrap();
        check_last_version(&file, &draft(8)).unwrap_err();
    }

    #[test]
    fn a_former_member_comes_back_only_if_the_operator_says_so() {
        let mut roster = Roster::first(&SigningKey::from_bytes(&[9; 32]), Timestamp(1));
        add(&mut roster, &member(1), added("a", &[], Some(true))).unwrap();
        assert!(without_keepers(&roster).is_empty());
        roster.remove(&member(1).writer, BTreeMap::new());
        assert_eq!(without_keepers(&roster).len(), 1);
        add(&mut roster, &member(1), added("a", &[], Some(true))).unwrap_err();
        add(&mut roster, &member(1), AddedMember { readmit: true, ..added("a", &[], Some(true)) }).unwrap();
    }
}
