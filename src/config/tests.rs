use super::*;
use proptest::prelude::*;

fn parse(pairs: &[(&str, &str)]) -> Result<Config, parse::Invalid> {
    Config::parse(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value)))
}

#[test]
fn an_empty_environment_gives_the_defaults() {
    assert_eq!(parse(&[]).unwrap(), Config::default());
    assert_eq!(parse(&[("TWOSHOT_MAX_BYTES", "")]).unwrap(), Config::default());
}

#[test]
fn sizes_take_binary_suffixes() {
    for (text, bytes) in [("65536", 65536), ("64K", 65536), ("64kib", 65536), ("4M", 4 << 20), ("1G", 1 << 30)] {
        assert_eq!(parse(&[("TWOSHOT_MAX_BYTES", text)]).unwrap().max_bytes, Some(bytes), "{text}");
    }
}

#[test]
fn a_malformed_value_is_an_error_that_names_the_variable() {
    for (name, value) in [
        ("TWOSHOT_ENABLE", "maybe"),
        ("TWOSHOT_MAX_BYTES", "2G"),
        ("TWOSHOT_MAX_BYTES", "-1"),
        ("TWOSHOT_MAX_BLOCKS", "0"),
        ("TWOSHOT_MODE", "fast"),
        ("TWOSHOT_ALGO", "ring"),
        ("TWOSHOT_SETUP_TIMEOUT_MS", "1e9"),
    ] {
        let error = parse(&[(name, value)]).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(value), "{error}");
    }
}

#[test]
fn a_malformed_variable_never_changes_the_mode() {
    let of = |pairs: &[(&str, &str)]| {
        Config::of(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value)))
    };
    let malformed = [
        ("TWOSHOT_ENABLE", "maybe"),
        ("TWOSHOT_ALGO", "ring"),
        ("TWOSHOT_MIN_BYTES", "few"),
        ("TWOSHOT_MAX_BYTES", "lots"),
        ("TWOSHOT_ONESHOT_MAX_BYTES", "-1"),
        ("TWOSHOT_MAX_BLOCKS", "0"),
        ("TWOSHOT_MEMORY", "all"),
        ("TWOSHOT_MULTICAST", "sometimes"),
        ("TWOSHOT_TIMEOUT_MS", "soon"),
        ("TWOSHOT_SETUP_TIMEOUT_MS", "1e9"),
        ("TWOSHOT_SHARED_GPU", "2"),
    ];
    for (word, mode) in [("", Mode::Direct), ("direct", Mode::Direct), ("CollNet", Mode::CollNet), ("off", Mode::Off)] {
        for variable in malformed {
            let config = of(&[("TWOSHOT_MODE", word), ("TWOSHOT_NET", "/x.so"), variable]);
            assert_eq!((config.mode, &config.net), (mode, &Some(PathBuf::from("/x.so"))), "{word} {variable:?}");
            assert!(config.invalid.is_some_and(|line| line.contains(variable.0)), "{word} {variable:?}");
        }
        assert_eq!(of(&[("TWOSHOT_MODE", word)]).invalid, None);
    }
    for others in [&[][..], &malformed] {
        let config = of(&[&[("TWOSHOT_MODE", "fast")], others].concat());
        assert_eq!(config.mode, Mode::Off);
        assert!(config.invalid.is_some_and(|line| line.contains("TWOSHOT_MODE=fast")));
    }
}

#[test]
fn nccl_algo_and_proto_are_obeyed_only_where_they_name_allreduce() {
    for (value, forbidden) in [
        ("Ring", true),
        ("allreduce:tree", true),
        ("broadcast:ring;AllReduce:nvls", true),
        ("broadcast:ring", false),
        ("^NVLS", false),
        ("allreduce:^ring,tree", false),
        ("^NVLS;allreduce:tree", true),
        (";", false),
    ] {
        assert_eq!(parse(&[("NCCL_ALGO", value)]).unwrap().forbidden.is_some(), forbidden, "{value}");
        assert_eq!(parse(&[("NCCL_PROTO", value)]).unwrap().forbidden.is_some(), forbidden, "{value}");
    }
}

#[test]
fn a_list_that_excludes_nvls_keeps_multicast_away() {
    for (value, multicast) in [
        ("^NVLS", false),
        ("allreduce:^nvlstree", false),
        ("^ring,NVLS", false),
        ("^ring", true),
        ("broadcast:^nvls", true),
    ] {
        assert_eq!(parse(&[("NCCL_ALGO", value)]).unwrap().multicast, multicast, "{value}");
    }
}

#[test]
fn the_users_nccl_switches_are_obeyed() {
    assert!(parse(&[("NCCL_P2P_DISABLE", "1")]).unwrap().forbidden.is_some());
    assert!(parse(&[("NCCL_P2P_DISABLE", "0")]).unwrap().forbidden.is_none());
    assert!(parse(&[("NCCL_CUMEM_ENABLE", "0")]).unwrap().forbidden.is_some());
    assert!(parse(&[("NCCL_P2P_LEVEL", "loc")]).unwrap().forbidden.is_some());
    assert!(parse(&[("NCCL_P2P_LEVEL", "NVL")]).unwrap().forbidden.is_none());
    assert!(!parse(&[("NCCL_NVLS_ENABLE", "0")]).unwrap().multicast);
    assert!(parse(&[("NCCL_NVLS_ENABLE", "2")]).unwrap().multicast);
    assert!(!parse(&[("NCCL_MNNVL_ENABLE", "0")]).unwrap().mnnvl);
    assert_eq!(parse(&[("NCCL_MNNVL_CLIQUE_ID", "-1")]).unwrap().mnnvl_clique, None);
    assert_eq!(parse(&[("NCCL_MNNVL_UUID", "0xff")]).unwrap().mnnvl_uuid, Some(255));
    for (value, channels) in [("8", 8), ("010", 0), ("0x8", 0), ("-2", 0), ("8 or so", 0), ("", 0), ("9999999999", 0)] {
        assert_eq!(parse(&[("NCCL_MIN_NCHANNELS", value)]).unwrap().channels, channels, "{value}");
    }
}

#[test]
fn ranks_with_different_limits_have_different_digests_and_merged_settings_do_not_count() {
    let base = parse(&[]).unwrap().digest();
    let limits = [
        ("TWOSHOT_MAX_BYTES", "1M"),
        ("TWOSHOT_ALGO", "oneshot"),
        ("TWOSHOT_ALGO", "switch"),
        ("TWOSHOT_ALGO", "bulk"),
        ("TWOSHOT_MIN_BYTES", "1"),
    ];
    for pair in limits {
        assert_ne!(parse(&[pair]).unwrap().digest(), base, "{pair:?}");
    }
    let merged = [
        ("TWOSHOT_MAX_BLOCKS", "3"),
        ("TWOSHOT_MULTICAST", "0"),
        ("TWOSHOT_SWITCH_REDUCE", "1"),
        ("TWOSHOT_TIMEOUT_MS", "5"),
    ];
    for pair in merged {
        assert_eq!(parse(&[pair]).unwrap().digest(), base, "{pair:?}");
    }
}

#[test]
fn sums_in_the_switch_are_off_unless_they_are_asked_for() {
    assert!(!parse(&[]).unwrap().switch_reduce);
    assert!(parse(&[("TWOSHOT_SWITCH_REDUCE", "1")]).unwrap().switch_reduce);
    assert!(!parse(&[("TWOSHOT_ALGO", "switch")]).unwrap().switch_reduce);
    assert!(parse(&[("TWOSHOT_SWITCH_REDUCE", "please")]).is_err());
}

#[test]
fn a_tuning_file_is_read_once_it_is_named_and_a_bad_one_is_named_in_one_line() {
    let named = || parse(&[("TWOSHOT_TUNING_FILE", "/etc/t.json")]).unwrap();
    assert_eq!(named().tuning, None, "parsing alone reads no file");
    let with = |text: &str| named().with_tuning(|_| Ok(text.as_bytes().to_vec())).tuning.unwrap();
    assert!(with(r#"{"format": 1, "rows": []}"#).is_ok());
    let error = with("{\n\n\u{1b}[31m").unwrap_err();
    assert!(error.starts_with("TWOSHOT_TUNING_FILE=/etc/t.json: ") && !error.contains(char::is_control), "{error}");
    let missing = named().with_tuning(|_| Err(io::Error::from(io::ErrorKind::NotFound))).tuning.unwrap();
    assert!(missing.unwrap_err().contains("not found"));
    assert_eq!(parse(&[]).unwrap().with_tuning(|_| unreachable!()).tuning, None);
}

#[test]
fn a_tuning_file_has_a_vote_of_its_own_and_is_not_in_the_digest_of_limits() {
    let tuned = parse(&[("TWOSHOT_TUNING_FILE", "/etc/t.json")]).unwrap();
    assert_eq!(tuned.digest(), parse(&[]).unwrap().digest());
}

proptest! {
    #[test]
    fn no_environment_makes_the_parser_panic(values in prop::collection::vec(".{0,40}", VARIABLES.len())) {
        let _ = Config::parse(|name| {
            let index = VARIABLES.iter().position(|variable| variable.name == name)?;
            Some(OsString::from(&values[index]))
        });
    }
}

#[test]
fn the_documentation_lists_exactly_the_variables_the_library_reads() {
    let rows = VARIABLES.iter().map(|v| format!("| `{}` | {} | {} |\n", v.name, v.default, v.meaning));
    let table: String = rows.collect();
    let document = include_str!("../../docs/environment.md");
    assert!(document.ends_with(&table), "docs/environment.md differs from the table; it should end with\n{table}");
    let source = include_str!("mod.rs");
    for name in source.split('"').filter(|word| word.starts_with("TWOSHOT_") || word.starts_with("NCCL_")) {
        let name = name.split('=').next().unwrap_or(name).trim();
        let known = VARIABLES.iter().any(|variable| variable.name == name.split(' ').next().unwrap_or(name));
        assert!(known, "{name} is read and not in the table");
    }
}

#[test]
fn in_mode_collnet_nccls_own_words_are_left_to_nccl_and_peer_memory_still_needs_leave() {
    let parse = |pairs: &[(&str, &str)]| parse(&[&[("TWOSHOT_MODE", "collnet")], pairs].concat()).unwrap();
    let config =
        parse(&[("NCCL_ALGO", "allreduce:collnetchain"), ("NCCL_MNNVL_ENABLE", "0"), ("TWOSHOT_NET", "/x.so")]);
    assert_eq!((config.mode, config.forbidden, config.mnnvl), (Mode::CollNet, None, true));
    assert_eq!(config.net, Some(PathBuf::from("/x.so")));
    assert!(parse(&[("NCCL_P2P_DISABLE", "1")]).forbidden.is_some());
    assert_eq!(parse(&[("NCCL_SOCKET_IFNAME", "=eth0")]).interfaces.as_deref(), Some("=eth0"));
}
