# SPDX-License-Identifier: Apache-2.0
"""JSON schemas as applications send them: tool calls, records, enumerations, arrays, nested and recursive ones.

Every string has a bound or a pattern: the shipped model was trained on the Bible and on Python, and would not end a
free string by itself.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

INTEGER: Schema = {"type": "integer", "minimum": 0, "maximum": 9999}
BOOLEAN: Schema = {"type": "boolean"}
DATE: Schema = {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])$"}
CURRENCY: Schema = {"enum": ["EUR", "USD", "GBP", "JPY"]}


def text(length: int) -> Schema:
    """A string of at most so many characters."""
    return {"type": "string", "maxLength": length}


def choice(*values: str) -> Schema:
    """One of some strings."""
    return {"enum": list(values)}


def number(most: int) -> Schema:
    """An integer from 0."""
    return {"type": "integer", "minimum": 0, "maximum": most}


def array(items: Schema, most: int, least: int = 1) -> Schema:
    """A list of `least` to `most` items."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def record(**properties: Schema) -> Schema:
    """An object with all of these properties and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def call(name: str, **arguments: Schema) -> Schema:
    """A tool call as servers ask for it."""
    return record(name={"const": name}, arguments=record(**arguments))


ADDRESS = record(street=text(16), house_number=number(999), postal_code={"type": "string", "pattern": "^[0-9]{5}$"},
                 city=text(12), country=choice("DE", "FR", "IT", "US"))  # fmt: skip
MONEY = record(amount=INTEGER, currency=CURRENCY)


def _recursive(name: str, body: Schema) -> Schema:
    return {"$defs": {name: body}, "$ref": f"#/$defs/{name}"}


SCHEMAS: dict[str, Schema] = {
    "tool_weather": call("get_current_weather", location=text(16), temperature_unit=choice("celsius", "fahrenheit")),
    "tool_flight": call(
        "search_flights", departure_airport={"type": "string", "pattern": "^[A-Z]{3}$"},
        arrival_airport={"type": "string", "pattern": "^[A-Z]{3}$"}, departure_date=DATE,
        number_of_passengers=number(9),
        cabin_class=choice("economy", "premium_economy", "business", "first"), direct_flights_only=BOOLEAN),
    "tool_calendar": call(
        "create_calendar_event", title=text(20), start_date=DATE, duration_minutes=number(480), is_recurring=BOOLEAN,
        visibility=choice("public", "private", "confidential")),
    "tool_email": call(
        "send_email_message", recipient_group=choice("customers", "employees", "suppliers"), subject=text(24),
        priority=choice("low", "normal", "high"), request_read_receipt=BOOLEAN),
    "tool_search": call(
        "search_knowledge_base", query=text(24), maximum_results=number(50), include_archived_documents=BOOLEAN,
        sort_order=choice("relevance", "date_ascending", "date_descending")),
    "tool_payment": call(
        "transfer_money", source_account={"type": "string", "pattern": "^[0-9]{8}$"},
        destination_account={"type": "string", "pattern": "^[0-9]{8}$"}, amount=INTEGER, currency=CURRENCY,
        execution_date=DATE, is_urgent=BOOLEAN),
    "tool_of_three": {
        "anyOf": [
            call("open_support_ticket", category=choice("billing", "technical", "account"), description=text(24)),
            call("close_support_ticket", ticket_number=INTEGER, resolution=choice("solved", "duplicate", "rejected")),
            call("escalate_support_ticket", ticket_number=INTEGER, escalation_level=number(3)),
        ]
    },
    "tool_smart_home": call(
        "set_thermostat", room=choice("kitchen", "bedroom", "living_room", "office"), target_temperature=number(30),
        heating_mode=choice("comfort", "economy", "frost_protection"), duration_minutes=number(600)),
    "tool_parallel": array(
        {"anyOf": [call("turn_light_on", room=choice("kitchen", "office"), brightness_percent=number(100)),
                   call("turn_light_off", room=choice("kitchen", "office"), delay_seconds=number(60))]}, 3, 2),
    "tool_database": call(
        "run_database_query", table_name=choice("customers", "orders", "products", "shipments"),
        selected_columns=array(choice("identifier", "created_at", "updated_at", "status"), 3),
        row_limit=INTEGER, include_deleted_rows=BOOLEAN),
    "order": record(
        order_number=INTEGER, customer_identifier=INTEGER, delivery_address=ADDRESS, total_price=MONEY,
        payment_method=choice("credit_card", "bank_transfer", "cash_on_delivery"), is_gift=BOOLEAN),
    "invoice": record(
        invoice_number=INTEGER, invoice_date=DATE, due_date=DATE,
        line_items=array(record(description=text(16), quantity=number(99), unit_price=MONEY), 3),
        value_added_tax_percent=number(25)),
    "customer": record(
        first_name=text(10), last_name=text(12), date_of_birth=DATE, preferred_language=choice("de", "en", "fr"),
        newsletter_subscription=BOOLEAN, billing_address=ADDRESS),
    "product": record(
        stock_keeping_unit={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}, product_name=text(20), price=MONEY,
        availability=choice("in_stock", "out_of_stock", "preorder"), weight_in_grams=INTEGER, is_fragile=BOOLEAN),
    "shipment": record(
        tracking_number={"type": "string", "pattern": "^[0-9]{10}$"}, carrier=choice("dhl", "ups", "fedex", "gls"),
        shipment_status=choice("label_created", "in_transit", "out_for_delivery", "delivered"),
        estimated_delivery_date=DATE, origin=ADDRESS, destination=ADDRESS),
    "insurance_claim": record(
        claim_number=INTEGER, policy_number=INTEGER, incident_date=DATE,
        damage_category=choice("fire", "water", "theft", "storm"), estimated_damage=MONEY,
        police_report_available=BOOLEAN, description=text(30)),
    "patient": record(
        patient_identifier=INTEGER, blood_group=choice("A", "B", "AB", "O"), rhesus_factor=choice("positive",
        "negative"),
        known_allergies=array(choice("penicillin", "latex", "pollen", "nuts"), 2, 0), last_examination_date=DATE,
        vital_signs=record(heart_rate=number(220), systolic_pressure=number(250), diastolic_pressure=number(150))),
    "classification": record(
        sentiment=choice("positive", "neutral", "negative"), confidence_percent=number(100),
        topic=choice("politics", "economy", "sports", "culture", "science"), contains_personal_data=BOOLEAN),
    "moderation": record(
        is_harmful=BOOLEAN, categories=record(violence=BOOLEAN, harassment=BOOLEAN, self_harm=BOOLEAN,
        hate_speech=BOOLEAN),
        recommended_action=choice("allow", "review", "block")),
    "entities": record(entities=array(record(
        surface_form=text(12), entity_type=choice("person", "organization", "location"), start_offset=INTEGER,
        end_offset=INTEGER), 3)),
    "language_detection": record(
        detected_language=choice("english", "german", "french", "hebrew", "greek"), script=choice("latin", "greek",
        "hebrew"),
        is_machine_translated=BOOLEAN),
    "resume": record(
        full_name=text(16), years_of_experience=number(40), highest_degree=choice("none", "bachelor", "master",
        "doctorate"),
        programming_languages=array(choice("python", "rust", "java", "go"), 3), willing_to_relocate=BOOLEAN),
    "job_posting": record(
        job_title=text(20), employment_type=choice("full_time", "part_time", "contract"), remote_work_allowed=BOOLEAN,
        salary_range=record(minimum=MONEY, maximum=MONEY), application_deadline=DATE),
    "recipe": record(
        recipe_title=text(20), preparation_minutes=number(240), number_of_servings=number(12),
        difficulty=choice("easy", "medium", "hard"),
        ingredients=array(record(ingredient_name=text(12), quantity=number(999), unit=choice("gram", "millilitre",
        "piece")),
                          3, 2)),
    "sensor_reading": record(
        sensor_identifier={"type": "string", "pattern": "^[a-f0-9]{8}$"}, measured_quantity=choice("temperature",
        "humidity"),
        measured_value=INTEGER, battery_level_percent=number(100), is_calibrated=BOOLEAN),
    "sensor_batch": array(record(
        timestamp_seconds=INTEGER, temperature_celsius=number(60), relative_humidity=number(100),
        door_open=BOOLEAN), 4, 3),
    "log_entry": record(
        severity=choice("debug", "info", "warning", "error", "critical"), component=choice("scheduler", "worker",
        "server"),
        request_identifier={"type": "string", "pattern": "^[a-f0-9]{12}$"}, duration_milliseconds=INTEGER,
        message=text(24)),
    "deployment": record(
        environment=choice("development", "staging", "production"), replica_count=number(64),
        rolling_update_enabled=BOOLEAN,
        resource_limits=record(cpu_millicores=INTEGER, memory_mebibytes=INTEGER), image_tag=text(10)),
    "game_state": record(
        current_player=choice("white", "black"), move_number=number(200), castling_rights=record(
            white_kingside=BOOLEAN, white_queenside=BOOLEAN, black_kingside=BOOLEAN, black_queenside=BOOLEAN),
        evaluation_centipawns=INTEGER),
    "optional_fields": {
        "type": "object",
        "properties": {"account_identifier": INTEGER, "display_name": text(12), "account_status": choice("active",
        "locked"),
                       "two_factor_enabled": BOOLEAN, "preferred_currency": CURRENCY},
        "required": ["account_identifier", "account_status"], "additionalProperties": False,
    },
    "recursive_tree": _recursive("tree_node", record(
        node_label=choice("root", "branch", "leaf"), node_weight=number(99),
        child_nodes=array({"$ref": "#/$defs/tree_node"}, 2, 0))),
    "recursive_comments": _recursive("comment", record(
        author_name=text(8), comment_text=text(16), number_of_likes=number(999), is_edited=BOOLEAN,
        replies=array({"$ref": "#/$defs/comment"}, 1, 0))),
    "recursive_filter": _recursive("filter", {"anyOf": [
        record(filter_operator=choice("and", "or"), operands=array({"$ref": "#/$defs/filter"}, 2, 2)),
        record(column_name=choice("price", "weight", "colour"), comparison=choice("equals", "greater_than",
        "less_than"),
               comparison_value=INTEGER)]}),
    "recursive_folder": _recursive("folder", record(
        folder_name=text(8), access_mode=choice("read_only", "read_write"), file_count=number(99),
        subfolders=array({"$ref": "#/$defs/folder"}, 1, 0))),
}  # fmt: skip

#: Ways to begin an answer, which differ by pass so that none repeats another's output.
PROMPTS = (
    "def make_request():\n    return ", "And the LORD spake unto Moses, saying, ", "record = json.loads(",
    "# the answer of the server\n", "In the beginning ", "class Reply:\n    data = ", "result = call(",
    "And it came to pass in those days that ", "print(json.dumps(", "Thus saith the king: ", "import json\nvalue = ",
    "The book of the generations of ", "return json.dumps(", "And he answered and said unto them, ",
    "    self.payload = ", "# example of a record:\n", "Now these are the names: ", "expected = ", "yield ",
    "Hear, O Israel: ", "def test_reply(self):\n    assert reply == ", "And the king commanded, and they brought ",
    "for item in [", "Then answered the prophet: ",
)  # fmt: skip
