//! Rust types and constants from C headers (bindgen): never functions, for they are resolved at run time.

use std::path::Path;

use crate::toolchain;

/// Header below the repository root, and the generated file in `OUT_DIR`.
const HEADERS: [(&str, &str); 6] = [
    ("kernels/args.h", "args.rs"),
    ("include/nccl_net_abi.h", "net_abi.rs"),
    ("include/nccl_tuner_abi.h", "tuner_abi.rs"),
    ("include/nccl_api.h", "nccl_api.rs"),
    ("include/cuda_abi.h", "cuda_abi.rs"),
    ("include/nvml_abi.h", "nvml_abi.rs"),
];

pub fn generate(root: &Path, out: &Path) -> Result<(), String> {
    if let Some(directory) = toolchain::libclang(root) {
        // SAFETY: the build script has one thread at this point.
        unsafe { std::env::set_var("LIBCLANG_PATH", directory) };
    }
    let compiler_headers = toolchain::compiler_headers();
    for (header, generated) in HEADERS {
        let path = root.join(header);
        let folder = path.parent().map(|folder| folder.display().to_string()).unwrap_or_default();
        let mut builder = bindgen::Builder::default()
            .header(path.display().to_string())
            .clang_args(["-x", "c", "-std=c11", "-I", &folder])
            // What our own headers declare, and what those declarations need; not all of stdint.h.
            .allowlist_file(format!("{}/.*", escape(&folder)))
            .ignore_functions()
            .default_enum_style(bindgen::EnumVariation::Consts)
            .layout_tests(true)
            .derive_debug(true)
            .derive_copy(true)
            .derive_default(true)
            .generate_comments(true)
            .use_core()
            .formatter(bindgen::Formatter::None);
        if let Some(directory) = &compiler_headers {
            builder = builder.clang_args(["-idirafter", &directory.display().to_string()]);
        }
        builder
            .generate()
            .map_err(|error| format!("bindgen of {header}: {error} (scripts/setup installs libclang)"))?
            .write_to_file(out.join(generated))
            .map_err(|error| format!("{generated}: {error}"))?;
    }
    Ok(())
}

/// `allowlist_file` takes a regular expression.
fn escape(path: &str) -> String {
    path.chars().flat_map(|c| (!(c.is_alphanumeric() || c == '/')).then_some('\\').into_iter().chain([c])).collect()
}
