//! The section `translators`: codecs on topics.

use std::time::Duration;

use super::claims::Names;
use super::report::Report;
use super::scalar::Name;
use super::serial::codec;
use super::source::Located;
use super::table::Table;
use crate::field::translate::{DeviceTemplate, Settings};
use crate::supervise::describe;
use crate::topic::TopicFilter;

pub(super) fn translators(table: &mut Table<'_>, names: &mut Names) -> Vec<Settings> {
    let meaning = "Codecs on topics: what sensors publish as bytes becomes readings.";
    table.list("translators", meaning, |table| {
        let name = table.value::<Name>("name", "Names the translator in the log and the UI.").required_at();
        names.adapters.extend(name.iter().map(Located::text));
        let filter = table.value::<TopicFilter>("filter", "Where the bytes arrive, as in `sensors/+/raw`.").required();
        let meaning = "A JavaScript file with `decodeUplink(input)`.";
        if table.place_of("codec").is_none() {
            table.missing("codec", "add `codec:` with the path of the file");
        }
        let codec = codec(table, "codec", meaning);
        let meaning = "How the device is named: `{1}` is what stands in place of the filter's first `+`.";
        let device = table.value::<String>("device", meaning).required_at();
        let silent_after = table
            .value("silent_after", "A device that publishes nothing for this long is down; never if absent.")
            .range(Duration::from_secs(1)..=Duration::from_secs(7 * 86_400))
            .optional();
        let filter = filter?;
        let device = device.and_then(|text| match DeviceTemplate::parse(&text.value, &filter) {
            Ok(template) => Some(template),
            Err(error) => {
                table.report(Report::error(text.span, "this device name cannot work").label(describe(&error)));
                None
            }
        });
        Some(Settings { name: name?.value.0.into(), filter, codec: codec?, device: device?, silent_after })
    })
}
