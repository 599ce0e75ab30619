//! What the two ends of a connection tell each other of themselves, and how they can share memory. Pure but for asking the
//! GPU.
#![forbid(unsafe_code)]

use crate::config::Config;
use crate::domain::MIN_ARCH;
use crate::driver::{Device, FabricFacts, HandleType, fabric_facts};
use crate::error::{Error, Result};
use crate::setup::{HostIdentity, build, overridden};

/// What an end says of itself.
pub struct Greeting {
    /// What the handle says that a caller must say.
    pub token: [u8; 16],
    /// The call is for the way beside a connection.
    pub beside: bool,
    build: u64,
    host: [u8; 16],
    fabric: FabricFacts,
    fabric_handles: bool,
}

/// Why two ends cannot share memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Apart {
    /// They are not built alike.
    Builds,
    /// They are in no NVLink domain in common.
    Domains,
}

impl Apart {
    /// As the receiver tells the sender: whichever of the two is heard first says it to its user.
    pub fn code(self) -> u8 {
        match self {
            Self::Builds => 0xB0,
            Self::Domains => 0xD0,
        }
    }

    /// From what the receiver said.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Builds, Self::Domains].into_iter().find(|apart| apart.code() == code)
    }

    /// For the user.
    pub fn error(self) -> Error {
        Error::Protocol(match self {
            Self::Builds => "the ranks run different versions of twoshot",
            Self::Domains => "two ranks are in no NVLink domain in common: set TWOSHOT_NET to the network between them",
        })
    }
}

/// Bytes of a greeting.
pub const GREETING: usize = 16 + 8 + 16 + 1 + 16 + 4 + 1 + 1;

impl Greeting {
    /// Of this end and its GPU.
    pub fn of(token: [u8; 16], ordinal: i32) -> Result<Self> {
        let config = Config::get();
        let facts = Device::new(ordinal)?.facts()?;
        if facts.arch < MIN_ARCH || !facts.vmm || !facts.fd_handles {
            return Err(Error::Protocol("this GPU cannot share memory as the network needs it"));
        }
        let fabric = overridden(fabric_facts(&facts.bus_id).unwrap_or_default(), config);
        let host = HostIdentity::read(config)?.bytes();
        Ok(Self { token, beside: false, build: build(), host, fabric, fabric_handles: facts.fabric_handles })
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; GREETING] {
        let mut out = [0; GREETING];
        out[..16].copy_from_slice(&self.token);
        out[16..24].copy_from_slice(&self.build.to_le_bytes());
        out[24..40].copy_from_slice(&self.host);
        out[40] = u8::from(self.fabric.completed);
        out[41..57].copy_from_slice(&self.fabric.uuid);
        out[57..61].copy_from_slice(&self.fabric.clique.to_le_bytes());
        out[61] = u8::from(self.fabric_handles);
        out[62] = u8::from(self.beside);
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; GREETING]) -> Option<Self> {
        let mut clique = [0; 4];
        clique.copy_from_slice(&bytes[57..61]);
        Some(Self {
            token: bytes[..16].try_into().ok()?,
            build: u64::from_le_bytes(bytes[16..24].try_into().ok()?),
            host: bytes[24..40].try_into().ok()?,
            fabric: FabricFacts {
                completed: bytes[40] == 1,
                uuid: bytes[41..57].try_into().ok()?,
                clique: u32::from_le_bytes(clique),
            },
            fabric_handles: bytes[61] == 1,
            beside: bytes[62] == 1,
        })
    }

    /// How memory can be shared with another end.
    pub fn way_to(&self, other: &Self) -> std::result::Result<HandleType, Apart> {
        if self.build != other.build {
            return Err(Apart::Builds);
        }
        if self.host == other.host {
            return Ok(HandleType::Fd);
        }
        let one_fabric = self.fabric.completed
            && other.fabric.completed
            && self.fabric.uuid != [0; 16]
            && (self.fabric.uuid, self.fabric.clique) == (other.fabric.uuid, other.fabric.clique);
        if one_fabric && self.fabric_handles && other.fabric_handles {
            return Ok(HandleType::Fabric);
        }
        Err(Apart::Domains)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeting(host: u8, cluster: u8, clique: u32) -> Greeting {
        Greeting {
            token: [1; 16],
            beside: false,
            build: 7,
            host: [host; 16],
            fabric: FabricFacts { completed: true, uuid: [cluster; 16], clique },
            fabric_handles: true,
        }
    }

    #[test]
    fn two_ends_share_by_descriptor_on_one_host_by_name_in_one_clique_and_else_not_at_all() {
        let ours = greeting(1, 5, 2);
        assert_eq!(ours.way_to(&greeting(1, 9, 9)).unwrap(), HandleType::Fd);
        assert_eq!(ours.way_to(&greeting(2, 5, 2)).unwrap(), HandleType::Fabric);
        for other in [greeting(2, 5, 3), greeting(2, 6, 2), Greeting { fabric_handles: false, ..greeting(2, 5, 2) }] {
            assert_eq!(ours.way_to(&other), Err(Apart::Domains));
        }
        assert_eq!(greeting(1, 0, 2).way_to(&greeting(2, 0, 2)), Err(Apart::Domains));
        assert_eq!(ours.way_to(&Greeting { build: 8, ..greeting(1, 5, 2) }), Err(Apart::Builds));
    }

    #[test]
    fn both_ends_say_the_same_of_what_keeps_them_apart() {
        for apart in [Apart::Builds, Apart::Domains] {
            assert_eq!(Apart::from_code(apart.code()), Some(apart));
        }
        assert!(Apart::Domains.error().to_string().contains("set TWOSHOT_NET"));
        assert_eq!(Apart::from_code(0), None);
    }

    #[test]
    fn a_greeting_comes_back_as_it_was() {
        let said = Greeting { beside: true, ..greeting(3, 4, 0x0102_0304) }.encode();
        let heard = Greeting::decode(&said).expect("a greeting");
        assert_eq!(heard.encode(), said);
        assert_eq!(
            (heard.build, heard.fabric.clique, heard.fabric_handles, heard.beside),
            (7, 0x0102_0304, true, true)
        );
    }
}
