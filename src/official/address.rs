//! What a handle says: where its maker listens, and a random token that a caller must show. Pure.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// Bytes of a handle, `NCCL_NET_HANDLE_MAXSIZE`.
pub const HANDLE: usize = 128;

const MAGIC: [u8; 4] = *b"2sht";

/// Where a listener is, and what it wants to hear.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Handle {
    /// Its address.
    pub address: SocketAddr,
    /// Its token.
    pub token: [u8; 16],
}

impl Handle {
    /// As NCCL carries it.
    pub fn encode(&self) -> [u8; HANDLE] {
        let mut out = [0; HANDLE];
        out[..4].copy_from_slice(&MAGIC);
        out[6..8].copy_from_slice(&self.address.port().to_le_bytes());
        match self.address {
            SocketAddr::V4(address) => {
                out[4] = 4;
                out[8..12].copy_from_slice(&address.ip().octets());
            }
            SocketAddr::V6(address) => {
                out[4] = 6;
                out[8..24].copy_from_slice(&address.ip().octets());
                out[24..28].copy_from_slice(&address.scope_id().to_le_bytes());
            }
        }
        out[32..48].copy_from_slice(&self.token);
        out
    }

    /// From what NCCL carried; `None` when it is not one of ours.
    pub fn decode(bytes: &[u8; HANDLE]) -> Option<Self> {
        if bytes[..4] != MAGIC {
            return None;
        }
        let port = u16::from_le_bytes([bytes[6], bytes[7]]);
        let address = match bytes[4] {
            4 => SocketAddr::from((<[u8; 4]>::try_from(&bytes[8..12]).ok()?, port)),
            6 => {
                let ip = Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[8..24]).ok()?);
                let scope = u32::from_le_bytes(bytes[24..28].try_into().ok()?);
                SocketAddr::V6(SocketAddrV6::new(ip, port, 0, scope))
            }
            _ => return None,
        };
        Some(Self { address, token: bytes[32..48].try_into().ok()? })
    }
}

/// The address that peers are told, by NCCL's rules for `NCCL_SOCKET_IFNAME`: a list of prefixes, `=` in front for
/// whole names, `^` to exclude. Without it: no loopback and no container bridge, unless there is nothing else.
pub fn choose(wanted: Option<&str>, interfaces: &[(String, IpAddr)]) -> IpAddr {
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(_) => true,
        // A link-local address needs the name of an interface, which the peer does not share.
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    };
    let bridge = |name: &str| name == "lo" || name.starts_with("docker") || name.starts_with("virbr");
    let matching = |accepted: &dyn Fn(&str) -> bool| {
        let mut found = interfaces.iter().filter(|(name, ip)| accepted(name) && usable(ip)).map(|(_, ip)| *ip);
        // IPv4 first, as NCCL does.
        found.clone().find(IpAddr::is_ipv4).or_else(|| found.next())
    };
    let chosen = match wanted {
        Some(wanted) => {
            let (exclude, rest) = wanted.strip_prefix('^').map_or((false, wanted), |rest| (true, rest));
            let (exact, list) = rest.strip_prefix('=').map_or((false, rest), |rest| (true, rest));
            let named = |name: &str| {
                let entries = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
                // NCCL's list may name ports behind a colon; an interface has none.
                entries
                    .map(|entry| entry.split(':').next().unwrap_or(entry))
                    .any(|entry| if exact { name == entry } else { name.starts_with(entry) })
            };
            matching(&|name| named(name) != exclude)
        }
        None => matching(&|name| !bridge(name)).or_else(|| matching(&|_| true)),
    };
    chosen.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_handle_comes_back_as_it_was_and_foreign_bytes_never(
            four: [u8; 4], six: [u8; 16], port: u16, scope: u32, token: [u8; 16], noise in prop::collection::vec(any::<u8>(), HANDLE),
        ) {
            for address in [
                SocketAddr::from((four, port)),
                SocketAddr::V6(SocketAddrV6::new(six.into(), port, 0, scope)),
            ] {
                let handle = Handle { address, token };
                prop_assert_eq!(Handle::decode(&handle.encode()), Some(handle));
            }
            let noise: [u8; HANDLE] = noise.try_into().unwrap();
            prop_assume!(noise[..4] != MAGIC);
            prop_assert_eq!(Handle::decode(&noise), None);
        }
    }

    #[test]
    fn the_users_interface_is_taken_and_without_a_word_none_that_peers_cannot_reach() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let here: Vec<(String, IpAddr)> = [
            ("lo", "127.0.0.1"),
            ("docker0", "172.17.0.1"),
            ("eth0", "fe80::1"),
            ("eth0", "10.0.0.5"),
            ("ib0", "2001:db8::1"),
            ("ib0", "10.1.0.5"),
        ]
        .map(|(name, at)| (name.to_owned(), ip(at)))
        .to_vec();
        for (wanted, expected) in [
            (None, "10.0.0.5"),
            (Some("ib"), "10.1.0.5"),
            (Some("=lo"), "127.0.0.1"),
            (Some("=ib"), "127.0.0.1"),
            (Some("^eth,lo,docker"), "10.1.0.5"),
            (Some("mlx,ib0:1"), "10.1.0.5"),
        ] {
            assert_eq!(choose(wanted, &here), ip(expected), "{wanted:?}");
        }
        assert_eq!(choose(None, &here[..2]), ip("127.0.0.1"));
        assert_eq!(choose(None, &[("eth0".to_owned(), ip("2001:db8::7"))]), ip("2001:db8::7"));
        assert_eq!(choose(None, &[]), ip("127.0.0.1"));
    }
}
