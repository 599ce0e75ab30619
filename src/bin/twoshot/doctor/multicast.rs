//! Multicast: what the GPUs say, and only where it is asked for, one object that is created and given back.
#![forbid(unsafe_code)]

use std::time::Duration;

use twoshot::config::Config;
use twoshot::driver::{
    Context, Device, Division, HandleType, MulticastObject, Slot, granularity, multicast_granularity,
};
use twoshot::error::{Error, Result};
use twoshot::steps::bounded;

use super::{Doctor, Findings, Mark};

const PATIENCE: Duration = Duration::from_secs(20);

/// `gpus`: how many there are, whether all have the attribute, and whether the fabric of all is completed.
pub fn examine(findings: &mut Findings, gpus: (u32, bool, bool), doctor: &Doctor, config: &Config) {
    let (count, able, ready) = gpus;
    let (mark, text) = match (able, config.multicast, ready) {
        (false, _, _) => (Mark::Info, "not on all GPUs: unicast is used".to_owned()),
        (true, false, _) => {
            let word = "TWOSHOT_MULTICAST=0 or NCCL_NVLS_ENABLE=0";
            (Mark::Info, format!("the GPUs have it; switched off by {word}: unicast is used"))
        }
        (true, true, false) => {
            (Mark::Warn, "the GPUs have it, but their fabric is not completed: unicast is used".to_owned())
        }
        (true, true, true) if !doctor.try_multicast || count < 2 => {
            (Mark::Info, "the GPUs have it (attribute; --try-multicast creates an object)".to_owned())
        }
        (true, true, true) => match attempt(count) {
            Ok(()) => {
                (Mark::Ok, format!("an object for {count} GPUs was created, all were added, and it was released"))
            }
            Err(error) => (Mark::Warn, format!("{error}: unicast is used")),
        },
    };
    findings.add(mark, "multicast", text);
}

fn attempt(count: u32) -> Result<()> {
    bounded("creating a multicast object", PATIENCE, move || {
        let contexts: Vec<_> =
            (0..count).map(|ordinal| Context::retain(Device::new(ordinal as i32)?)).collect::<Result<_>>()?;
        let first = contexts.first().ok_or(Error::Bug("no GPU"))?;
        let least = granularity(first, HandleType::Fd)?;
        let bytes = least.max(multicast_granularity(first, count, least, HandleType::Fd)?);
        let slot = Slot::take(first).ok_or(Error::Protocol("no multicast slot is left for this process"))?;
        let object = MulticastObject::create(first, count, Division::into_parts_of(bytes), HandleType::Fd, slot)?;
        contexts.iter().try_for_each(|context| object.add_device_of(context))
    })
}
