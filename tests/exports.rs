//! What libtwoshot.so shows to the dynamic linker, and where in the source that may come from.

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection, ObjectSymbol, ObjectSymbolTable, RelocationTarget};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// libtwoshot.so: named by the environment, or the one that was built together with this test.
fn twoshot() -> Vec<u8> {
    let test = std::env::current_exe().expect("this test's path");
    let path = match std::env::var_os("TWOSHOT_LIBRARY") {
        Some(path) => PathBuf::from(path),
        None => test
            .ancestors()
            .skip(1)
            .take(2)
            .map(|folder| folder.join("libtwoshot.so"))
            .find(|path| path.exists())
            .expect("libtwoshot.so beside or above this test"),
    };
    std::fs::read(path).expect("libtwoshot.so")
}

fn parse(bytes: &[u8]) -> ElfFile64<'_, Endianness> {
    ElfFile64::parse(bytes).expect("an ELF file")
}

fn exported(file: &ElfFile64<'_, Endianness>) -> BTreeSet<String> {
    file.dynamic_symbols()
        .filter(|symbol| symbol.is_definition())
        .map(|symbol| symbol.name().expect("a name").to_owned())
        .collect()
}

/// Values of one tag of the dynamic table.
fn dynamic(file: &ElfFile64<'_, Endianness>, tag: u64) -> Vec<u64> {
    let section = file.section_by_name(".dynamic").expect("a dynamic table");
    let bytes = section.data().expect("its bytes");
    let word = |at: &[u8]| u64::from_ne_bytes(at.try_into().expect("eight bytes"));
    bytes
        .chunks_exact(16)
        .map(|entry| (word(&entry[..8]), word(&entry[8..])))
        .take_while(|&(found, _)| found != 0)
        .filter(|&(found, _)| found == tag)
        .map(|(_, value)| value)
        .collect()
}

/// What the real libraries export, oldest first.
fn real_libraries() -> Vec<(String, BTreeSet<String>)> {
    let mut releases = Vec::<(String, BTreeSet<String>)>::new();
    for line in include_str!("data/nccl-exports.txt").lines().filter(|line| !line.starts_with('#')) {
        let names = releases.last_mut().map(|(_, names)| names);
        match (line.split_at_checked(1), names) {
            (Some(("+", name)), Some(names)) => assert!(names.insert(name.to_owned()), "{line} twice"),
            (Some(("-", name)), Some(names)) => assert!(names.remove(name), "{line} of nothing"),
            (Some(_), _) => {
                let version = line.split(' ').next().expect("a version").to_owned();
                let before = releases.last().map(|(_, names)| names.clone()).unwrap_or_default();
                releases.push((version, before));
            }
            (None, _) => {}
        }
    }
    assert!(releases.len() >= 20, "{} releases", releases.len());
    releases
}

/// Names in functions.txt, and how each is defined.
fn functions() -> Vec<(String, String)> {
    let text = include_str!("../src/intercept/functions.txt");
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert!(words.len() == 3 || words.len() > 3 && ["hand", "both"].contains(&words[2]), "{line}");
            assert!(["pass", "hand", "both"].contains(&words[2]), "{line}");
            (words[0].to_owned(), words[2].to_owned())
        })
        .collect()
}

#[test]
fn every_public_function_of_nccl_is_exported_under_both_names() {
    let bytes = twoshot();
    let exported = exported(&parse(&bytes));
    let expected = functions().into_iter().flat_map(|(name, _)| [format!("p{name}"), name]);
    let missing: Vec<String> = expected.filter(|name| !exported.contains(name)).collect();
    assert!(missing.is_empty(), "missing: {missing:?}");
}

#[test]
fn what_any_nccl_from_2_20_to_2_32_exports_is_exported() {
    let bytes = twoshot();
    let exported = exported(&parse(&bytes));
    let releases = real_libraries();
    assert!(releases[0].0.starts_with("2.20.") && releases.last().is_some_and(|(last, _)| last.starts_with("2.32.")));
    for (version, names) in releases {
        let missing: Vec<_> = names.difference(&exported).collect();
        assert!(names.len() > 50 && missing.is_empty(), "{version}: missing {missing:?}");
    }
}

#[test]
fn the_list_of_functions_names_the_release_that_brought_each() {
    let releases = real_libraries();
    for line in include_str!("../src/intercept/functions.txt").lines().filter(|line| line.starts_with("nccl")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let first = releases.iter().find(|(_, names)| names.contains(words[0]));
        let (version, _) = first.unwrap_or_else(|| panic!("no library exports {}", words[0]));
        assert!(version == words[1] || version == "2.20.5" && words[1] == "2.20", "{version}: {line}");
    }
}

#[test]
fn nothing_is_exported_but_nccl_functions_plugin_tables_and_our_own_names() {
    let bytes = twoshot();
    let known: BTreeSet<String> = functions().into_iter().flat_map(|(name, _)| [format!("p{name}"), name]).collect();
    let table = |name: &str| {
        let families = ["ncclNetPlugin_v", "ncclCollNetPlugin_v", "ncclTunerPlugin_v"];
        families.iter().filter_map(|family| name.strip_prefix(family)).any(|version| version.parse::<u32>().is_ok())
    };
    let foreign: Vec<String> = exported(&parse(&bytes))
        .into_iter()
        .filter(|name| !known.contains(name) && !table(name) && !name.starts_with("twoshot_"))
        .collect();
    assert!(foreign.is_empty(), "also exported: {foreign:?}");
}

#[test]
fn every_table_is_exported_in_every_version_that_nccl_2_20_to_2_32_asks_for_first() {
    let bytes = twoshot();
    let exported = exported(&parse(&bytes));
    for (family, versions) in [("ncclNetPlugin", 8..=12), ("ncclCollNetPlugin", 8..=12), ("ncclTunerPlugin", 3..=6)] {
        for version in versions {
            assert!(exported.contains(&format!("{family}_v{version}")), "{family}_v{version}");
        }
    }
}

#[test]
fn it_loads_on_a_machine_without_a_driver_or_nccl() {
    const DT_NEEDED: u64 = 1;
    let bytes = twoshot();
    let file = parse(&bytes);
    let strings = file.section_by_name(".dynstr").expect("a string table");
    let strings = strings.data().expect("its bytes");
    let needed: Vec<String> = dynamic(&file, DT_NEEDED)
        .into_iter()
        .map(|at| {
            let tail = &strings[usize::try_from(at).expect("an offset")..];
            let end = tail.iter().position(|&byte| byte == 0).expect("an end");
            String::from_utf8_lossy(&tail[..end]).into_owned()
        })
        .collect();
    let system = ["libc.so", "libgcc_s.so", "libm.so", "libdl.so", "libpthread.so", "librt.so", "ld-linux"];
    for name in &needed {
        let known = system.iter().any(|prefix| name.starts_with(prefix));
        assert!(known, "{name} has to be there for libtwoshot.so to load: {needed:?}");
    }
}

#[test]
fn it_stays_loaded_and_does_nothing_when_the_process_ends() {
    const DT_FLAGS_1: u64 = 0x6fff_fffb;
    const DF_1_NODELETE: u64 = 8;
    const DT_FINI_ARRAYSZ: u64 = 28;
    const DT_INIT_ARRAYSZ: u64 = 27;
    let bytes = twoshot();
    let file = parse(&bytes);
    let flags = dynamic(&file, DT_FLAGS_1).first().copied().unwrap_or(0);
    assert_ne!(flags & DF_1_NODELETE, 0, "not linked with -z nodelete");
    // One is the C runtime's; the other way round, Rust's standard library keeps the arguments of the program.
    let count = |tag| dynamic(&file, tag).first().copied().unwrap_or(0) / 8;
    assert!(count(DT_FINI_ARRAYSZ) <= 1, "a function of ours runs at exit");
    // On aarch64 two libraries of the compilers ask, each for itself, what atomics the processor has.
    let compilers = if file.architecture() == object::Architecture::Aarch64 { 2 } else { 0 };
    assert!(count(DT_INIT_ARRAYSZ) <= 2 + compilers, "a function of ours runs at load");
}

#[test]
fn its_own_uses_of_an_nccl_name_do_not_lead_to_the_stock_library() {
    let bytes = twoshot();
    let file = parse(&bytes);
    let names = file.dynamic_symbol_table().expect("dynamic symbols");
    let loose: BTreeSet<String> = file
        .dynamic_relocations()
        .into_iter()
        .flatten()
        .filter_map(|(_, relocation)| match relocation.target() {
            RelocationTarget::Symbol(index) => names.symbol_by_index(index).ok(),
            _ => None,
        })
        .filter_map(|symbol| symbol.name().ok().map(str::to_owned))
        .filter(|name| name.starts_with("nccl") || name.starts_with("pnccl"))
        .collect();
    assert!(loose.is_empty(), "not linked with -Bsymbolic: {loose:?}");
}

#[test]
fn the_generated_jumps_are_those_of_the_list() {
    let generated: BTreeSet<&str> = include_str!("../src/intercept/pass.rs")
        .lines()
        .filter_map(|line| line.trim().strip_suffix(';')?.split_once(' '))
        .filter(|(index, _)| index.parse::<usize>().is_ok())
        .map(|(_, name)| name)
        .collect();
    let listed: BTreeSet<String> = functions()
        .into_iter()
        .flat_map(|(name, how)| [(how != "both").then(|| format!("p{name}")), (how == "pass").then_some(name)])
        .flatten()
        .collect();
    assert!(generated.iter().copied().eq(listed.iter().map(String::as_str)), "run scripts/gen_pass.py");
}

#[test]
fn only_the_c_side_of_the_source_exports_names() {
    fn scan(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                scan(&path, found);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file");
                if ["no_mangle", "export_name"].iter().any(|word| text.contains(word)) {
                    found.push(path);
                }
            }
        }
    }
    let source = root().join("src");
    let mut found = Vec::new();
    scan(&source, &mut found);
    let allowed = [source.join("abi"), source.join("intercept")];
    found.retain(|path| !allowed.iter().any(|folder| path.starts_with(folder)));
    assert!(found.is_empty(), "exports outside src/abi and src/intercept: {found:?}");
}
