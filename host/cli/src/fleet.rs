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

/// The first word of the file of an admin key. The private key follows in hex.
const KEY_FORM: &str = "dim-fleet-admin-key-1";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the admin key of a new fleet, and print the name of the fleet
    ///
    /// The name goes into the config of each host: `fleet: { name: k51… }`. Whoever has the key decides who is a
    /// member: keep it away from the hosts, and keep a copy of it. Example: dim fleet init lab
    Init {
        /// Name of the file, without its ending .fleet-key
        name: String,
        /// File for the key [default: NAME.fleet-key]
        #[arg(long, value_name = "FILE")]
        admin_key: Option<PathBuf>,
    },
    /// Print the keys of the host in one line, for dim fleet add
    Join {
        /// Name of the fleet, k51…
        fleet: IpnsName,
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
        /// Group of the member; can be repeated
        #[arg(long, value_name = "GROUP", default_value = "all")]
        group: Vec<GroupName>,
        /// Let the member issue keys
        #[arg(long)]
        keeper: bool,
        /// Let new members of new groups read earlier events
        #[arg(long)]
        history: bool,
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
    /// List the members
    Ls {
        #[command(flatten)]
        watch: Watch,
    },
}

/// The options of a change of the roster.
#[derive(Debug, Args)]
pub struct Change {
    /// File of the admin key
    #[arg(long, value_name = "FILE", env = "DIM_FLEET_KEY")]
    admin_key: PathBuf,
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
            Self::Init { name, admin_key } => {
                let file = admin_key.unwrap_or_else(|| PathBuf::from(format!("{name}.fleet-key")));
                let key = make_key(&file)?;
                let fleet = WriterId::of(&key.verifying_key()).name();
                note(&format!("the admin key is in {}: keep it, and a copy of it", file.display()));
                if out.is_json() {
                    return out.rows(&serde_json::json!({ "fleet": fleet, "admin_key": file }), &[]);
                }
                line(fleet.as_str())
            }
            Self::Join { fleet } => {
                let known = client.get(&["fleet"], &[]).await?;
                if known["name"] != fleet.as_str() {
                    bail!(
                        "the host belongs to the fleet {}: set `fleet: {{ name: {fleet} }}` in its config, and restart it",
                        known["name"].as_str().unwrap_or_default()
                    );
                }
                if out.is_json() {
                    return out.rows(&serde_json::json!({ "line": known["line"] }), &[]);
                }
                line(known["line"].as_str().unwrap_or_default())
            }
            Self::Add { line, name, group, keeper, history, first, change } => {
                let groups: BTreeSet<GroupName> = group.into_iter().collect();
                change
                    .make(client, out, first, async |roster| {
                        add(roster, &line, name, groups, keeper, history)
                    })
                    .await
            }
            Self::Remove { member, change } => {
                change
                    .make(client, out, false, async |roster| {
                        let writer = find(roster, &member)?;
                        let cuts = ends_of_logs(client, &writer).await?;
                        roster.remove(&writer, cuts);
                        Ok(())
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
            Self::Ls { watch } => {
                const COLUMNS: [Column; 5] = [
                    Column::word("NAME", "/name"),
                    Column::word("ID", "/id"),
                    Column::text("GROUPS", "/groups"),
                    Column::word("KEEPER", "/is_keeper"),
                    Column::word("SINCE VERSION", "/since"),
                ];
                out.list(watch, &COLUMNS, async || Ok(client.get(&["fleet"], &[]).await?["members"].take()))
                    .await
            }
        }
    }
}

/// Adds or changes a member of a roster.
fn add(
    roster: &mut Roster,
    line: &MemberLine,
    label: MemberLabel,
    groups: BTreeSet<GroupName>,
    is_keeper: bool,
    history: bool,
) -> anyhow::Result<()> {
    let version = roster.version;
    let other = roster.members.iter().find(|(writer, row)| row.label == label && **writer != line.writer);
    if let Some((other, _)) = other {
        bail!("{label} is the name of another member, {other}: remove it first, or give another name");
    }
    let before = roster.members.get(&line.writer);
    let since = before.map_or(version, |row| row.since);
    let known: BTreeSet<GroupName> = before.map(|row| row.groups.clone()).unwrap_or_default();
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
    for name in roster.groups.keys() {
        let has_keeper = roster.members.values().any(|row| row.is_keeper && row.groups.contains(name));
        if !has_keeper {
            note(&format!("warning: no keeper belongs to group {name}: nobody issues its keys"));
        }
    }
    Ok(())
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
        let key = read_key(&self.admin_key)?;
        let known = client.get(&["fleet"], &[]).await?;
        let fleet = known["name"].as_str().unwrap_or_default().to_owned();
        let expires = Timestamp(Timestamp::wall().0.saturating_add(nanoseconds(self.valid)));
        let current = match client.get_bytes(&["fleet", "roster"]).await {
            Ok(block) => Some(SignedRoster::open(&block, &fleet)?),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(error.into()),
        };
        let mut next = match (&current, first) {
            (Some(current), false) => current.next(),
            (None, true) => Roster::first(&key, expires),
            (Some(_), true) => bail!("the host has a roster already: leave --first out"),
            (None, false) => bail!(
                "the host has no roster yet: ask a host that has one, or make the first one of the fleet with `dim fleet add --first`"
            ),
        };
        if next.fleet != fleet {
            bail!("this is not the admin key of the fleet {fleet} of the host, but that of {}", next.fleet);
        }
        if !next.admins().keys.contains(&WriterId::of(&key.verifying_key())) {
            bail!("this key is no admin key of the fleet {fleet}");
        }
        next.expires = expires;
        change(&mut next).await?;
        let mut draft = next.draft()?;
        draft.sign(&key);
        let block: Bytes = draft.to_block();
        let answer: Value = client.send_bytes(Method::PUT, &["fleet", "roster"], &[], block.to_vec()).await?;
        if out.is_json() {
            return out.rows(&answer, &[]);
        }
        line(&format!("roster {} of the fleet is on its way to the members", draft.roster.version))
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
    fn groups_get_new_keys_when_their_members_change() {
        let group = |name: &str| name.parse::<GroupName>().unwrap();
        let groups = |names: &[&str]| names.iter().map(|name| group(name)).collect::<BTreeSet<_>>();
        let mut roster = Roster::first(&SigningKey::from_bytes(&[9; 32]), Timestamp(1));
        add(&mut roster, &member(1), "a".parse().unwrap(), groups(&["x", "y"]), true, false).unwrap();
        let rekeyed = |roster: &Roster, name: &str| roster.groups[&group(name)].rekeyed;
        roster.version = 2;
        add(&mut roster, &member(2), "b".parse().unwrap(), groups(&["x"]), false, false).unwrap();
        assert_eq!((rekeyed(&roster, "x"), rekeyed(&roster, "y")), (2, 1));
        roster.version = 3;
        add(&mut roster, &member(1), "a".parse().unwrap(), groups(&["x"]), true, false).unwrap();
        assert_eq!((rekeyed(&roster, "x"), rekeyed(&roster, "y")), (2, 3));
        add(&mut roster, &member(3), "a".parse().unwrap(), groups(&["x"]), false, false).unwrap_err();
        assert_eq!(find(&roster, "b").unwrap(), member(2).writer);
        find(&roster, "c").unwrap_err();
    }
}
