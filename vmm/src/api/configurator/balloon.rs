//! Which calls of the balloon are allowed when.
use super::{Configurator, Effect, Outcome, Phase};
use crate::api::{Fault, Request};

impl Configurator {
    pub(super) fn balloon(&mut self, request: Request) -> Outcome {
        if let Request::PutBalloon(balloon) = request {
            self.before_start("/balloon")?;
            check_balloon_fits(
                Some(balloon.amount_mib),
                self.config.machine_config.mem_size_mib,
            )?;
            self.config.balloon = Some(balloon);
            return Ok(Effect::Done);
        }
        let started = !matches!(self.phase, Phase::Configuring { .. });
        let mem_size_mib = self.config.machine_config.mem_size_mib;
        let Some(balloon) = self.config.balloon.as_mut() else {
            return Err(no_balloon());
        };
        match request {
            Request::PatchBalloon(update) => {
                check_balloon_fits(Some(update.amount_mib), mem_size_mib)?;
                if started {
                    return Ok(Effect::UpdateBalloon(update));
                }
                balloon.amount_mib = update.amount_mib;
                return Ok(Effect::Done);
            }
            Request::PatchBalloonStats(update) => {
                let (old, new) = (
                    balloon.stats_polling_interval_s,
                    update.stats_polling_interval_s,
                );
                if !started {
                    balloon.stats_polling_interval_s = new;
                    return Ok(Effect::Done);
                }
                if (old == 0) != (new == 0) {
                    return Err(Fault::new(
                        "stats_polling_interval_s: statistics cannot be turned on or off after \
                         the start",
                    ));
                }
                return Ok(Effect::UpdateBalloonStats(update));
            }
            _ => {}
        }
        let (stats, hinting) = (balloon.stats_polling_interval_s, balloon.free_page_hinting);
        self.after_start("/balloon")?;
        let needs_hinting = || {
            if hinting {
                Ok(())
            } else {
                Err(Fault::new(
                    "/balloon/hinting: the balloon was configured without free_page_hinting",
                ))
            }
        };
        match request {
            Request::GetBalloonStats if stats == 0 => Err(Fault::new(
                "/balloon/statistics: the balloon was configured without statistics \
                 (stats_polling_interval_s 0)",
            )),
            Request::GetBalloonStats => Ok(Effect::ReadBalloonStats),
            Request::GetHintingStatus => needs_hinting().map(|()| Effect::ReadHinting),
            Request::StartHinting(start) => needs_hinting().map(|()| Effect::StartHinting(start)),
            Request::StopHinting => needs_hinting().map(|()| Effect::StopHinting),
            other => Err(Fault::new(format!("not a call of the balloon: {other:?}"))),
        }
    }
}

pub(super) fn no_balloon() -> Fault {
    Fault::new("/balloon: no balloon device is configured")
}

/// A balloon that takes everything would only make the guest kill its processes.
pub(super) fn check_balloon_fits(amount_mib: Option<u32>, mem_size_mib: u32) -> Result<(), Fault> {
    match amount_mib {
        Some(amount) if amount >= mem_size_mib => Err(Fault::new(format!(
            "amount_mib: {amount} is not less than the guest's {mem_size_mib} MiB of RAM"
        ))),
        _ => Ok(()),
    }
}
